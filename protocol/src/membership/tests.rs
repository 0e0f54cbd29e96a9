//! Members in virtual time, with delays, loss and cuts.

use super::*;

fn host(i: u8) -> HostId {
    HostId([i; 32])
}

fn site(i: u8) -> Name {
    if i < 3 { "paris".parse().unwrap() } else { "tokyo".parse().unwrap() }
}

struct Net {
    now: Time,
    nodes: Vec<Membership>,
    silent: BTreeSet<u8>,
    /// Members of different halves do not hear each other.
    cut: Option<u8>,
    queue: BTreeMap<(Time, u64), (u8, u8, Vec<u8>)>,
    number: u64,
    rng: StdRng,
    loss: f64,
    log: Vec<Vec<Output>>,
}

impl Net {
    fn new(n: u8, loss: f64) -> Self {
        let node = |i| Membership::new(host(i), site(i), 1, u64::from(i), Time(0));
        let mut net = Self {
            now: Time(0),
            nodes: (0..n).map(node).collect(),
            silent: BTreeSet::new(),
            cut: None,
            queue: BTreeMap::new(),
            number: 0,
            rng: StdRng::seed_from_u64(7),
            loss,
            log: vec![Vec::new(); usize::from(n)],
        };
        for i in 1..n {
            net.nodes[usize::from(i)].announce(Time(0), host(0));
        }
        net
    }

    fn settle(&mut self, i: u8) {
        while let Some(output) = self.nodes[usize::from(i)].poll_output() {
            let Output::Send { to, bytes } = output else {
                self.log[usize::from(i)].push(output);
                continue;
            };
            let to = to.0[0];
            let apart = self.cut.is_some_and(|cut| (i < cut) != (to < cut));
            let mute = self.silent.contains(&i) || self.silent.contains(&to);
            if !apart && !mute && !self.rng.random_bool(self.loss) {
                let ms = self.rng.random_range(1..80);
                self.number += 1;
                self.queue.insert((self.now.plus_ms(ms), self.number), (i, to, bytes));
            }
        }
    }

    fn run(&mut self, ms: u64) {
        let end = self.now.plus_ms(ms);
        for i in 0..self.nodes.len() as u8 {
            self.settle(i);
        }
        loop {
            let timer = self.nodes.iter().filter_map(Membership::poll_timeout).min();
            let event = self.queue.keys().next().copied();
            let next = timer.into_iter().chain(event.map(|e| e.0)).min();
            let Some(next) = next.filter(|t| *t <= end) else { break };
            self.now = self.now.max(next);
            if let Some(key) = event.filter(|e| e.0 <= self.now) {
                let (from, to, bytes) = self.queue.remove(&key).unwrap();
                let now = self.now;
                let result = self.nodes[usize::from(to)].handle_data(now, host(from), &bytes);
                assert_eq!(result, Ok(()));
                self.settle(to);
            } else {
                for i in 0..self.nodes.len() as u8 {
                    self.nodes[usize::from(i)].handle_timeout(self.now);
                    self.settle(i);
                }
            }
        }
        self.now = end;
    }

    fn all_alive(&self) -> bool {
        let n = self.nodes.len();
        self.nodes.iter().all(|node| {
            node.members().filter(|m| m.state == State::Alive && m.site.is_some()).count() == n - 1
        })
    }
}

#[test]
fn five_nodes_converge_and_know_their_sites() {
    let mut net = Net::new(5, 0.05);
    net.run(10_000);
    assert!(net.all_alive());
    let tokyo = net.nodes[0].members().filter(|m| m.site == Some(site(4))).count();
    assert_eq!(tokyo, 2);
    for log in &net.log {
        assert_eq!(log.iter().filter(|o| matches!(o, Output::Up(_))).count(), 4);
        assert!(!log.iter().any(|o| matches!(o, Output::Down(_))));
    }
}

#[test]
fn a_silent_member_is_declared_down_and_comes_back() {
    let mut net = Net::new(5, 0.0);
    net.run(10_000);
    net.silent.insert(3);
    net.run(20_000);
    for i in [0, 1, 2, 4] {
        assert_eq!(net.nodes[i].state(host(3)), Some(State::Down), "node {i}");
        assert!(net.log[i].contains(&Output::Down(host(3))));
    }
    net.silent.clear();
    net.run(20_000);
    assert!(net.all_alive());
    assert_eq!(net.log[0].last(), Some(&Output::Up(host(3))));
}

#[test]
fn a_restarted_member_with_a_higher_generation_is_taken() {
    let mut net = Net::new(3, 0.0);
    net.run(10_000);
    net.nodes[2] = Membership::new(host(2), site(2), 2, 99, net.now);
    let now = net.now;
    net.nodes[2].announce(now, host(1));
    net.run(10_000);
    assert!(net.all_alive());
}

#[test]
fn a_cut_of_five_seconds_heals() {
    for seed in 0..100 {
        let mut net = Net::new(5, 0.02);
        net.rng = StdRng::seed_from_u64(seed);
        net.run(10_000);
        net.cut = Some(3);
        net.run(5000);
        let doubted = net.nodes[0].members().filter(|m| m.state != State::Alive).count();
        assert!(doubted > 0, "seed {seed}: a cut is noticed");
        net.cut = None;
        net.run(30_000);
        assert!(net.all_alive(), "seed {seed}");
    }
}

#[test]
fn two_nodes_that_gave_each_other_up_find_back() {
    let mut net = Net::new(2, 0.0);
    net.run(5000);
    net.cut = Some(1);
    net.run(60_000);
    assert_eq!(net.nodes[0].state(host(1)), Some(State::Down));
    net.cut = None;
    net.run(15_000);
    assert!(net.all_alive());
}

#[test]
fn who_leaves_is_down_at_once_and_silent() {
    let mut net = Net::new(3, 0.0);
    net.run(10_000);
    let now = net.now;
    net.nodes[2].leave(now);
    net.run(2000);
    assert_eq!(net.nodes[0].state(host(2)), Some(State::Down));
    net.run(20_000);
    assert_eq!(net.nodes[0].state(host(2)), Some(State::Down));
}

#[test]
fn junk_and_strangers_change_nothing() {
    let mut a = Membership::new(host(0), site(0), 1, 1, Time(0));
    assert!(matches!(a.handle_data(Time(0), host(1), &[]), Err(MembershipError::Malformed(_))));
    assert!(a.handle_data(Time(0), host(1), &[0xff; 9000]).is_err());
    let mut b = Membership::new(host(1), site(1), 1, 1, Time(0));
    b.announce(Time(0), host(0));
    let Some(Output::Send { bytes, .. }) = b.poll_output() else { panic!("no greeting") };
    let brought = a.handle_data(Time(0), host(2), &bytes);
    assert!(matches!(brought, Err(MembershipError::NotTheSender { .. })));
    for cut in 0..bytes.len() {
        drop(a.handle_data(Time(0), host(1), &bytes[..cut]));
    }
    assert_eq!(a.members().count(), 0);
    assert_eq!(a.handle_data(Time(0), host(1), &bytes), Ok(()));
    assert_eq!(a.members().count(), 1);
}

#[test]
fn the_table_is_bounded() {
    let mut a = Membership::new(host(0), site(0), 1, 1, Time(0));
    let mut refused = 0;
    for i in 0..MEMBERS + 10 {
        let mut id = [1; 32];
        id[..4].copy_from_slice(&(i as u32).to_be_bytes());
        let mut b = Membership::new(HostId(id), site(1), 1, 1, Time(0));
        b.announce(Time(0), host(0));
        let Some(Output::Send { bytes, .. }) = b.poll_output() else { panic!("no greeting") };
        refused += usize::from(a.handle_data(Time(0), HostId(id), &bytes).is_err());
        while a.poll_output().is_some() {}
    }
    assert_eq!((a.members().count(), refused), (MEMBERS, 10));
}
