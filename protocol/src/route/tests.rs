//! Tables in virtual time, with delays, doubling and loss.

use super::*;
use crate::id::CopyId;
use crate::limits::CONTROL_MESSAGE_BYTES;
use crate::wire::codec::encode;
use crate::wire::control::Control;
use crate::wire::route::Kind;
use proptest::prelude::*;

fn host(i: u8) -> HostId {
    HostId([i; 32])
}

fn vm(i: u32) -> VmId {
    let mut id = [0; 16];
    id[..4].copy_from_slice(&i.wrapping_mul(0x9e37_79b1).to_be_bytes());
    VmId(id)
}

fn wire() -> Name {
    "lan".parse().unwrap()
}

fn mac(i: u32) -> Mac {
    let [a, b, c, d] = i.to_be_bytes();
    Mac([2, 0, a, b, c, d])
}

fn route(i: u32, at: u8, epoch: u64) -> Route {
    Route {
        vm: vm(i),
        name: format!("vm-{i}").parse().unwrap(),
        host: host(at),
        copy: CopyId([at; 16]),
        epoch: Epoch(epoch),
        nics: vec![Nic { wire: wire(), mac: mac(i) }],
        kind: Kind::Vm,
        gone: false,
    }
}

struct Net {
    now: Time,
    nodes: Vec<Routes>,
    queue: BTreeMap<(Time, u64), (u8, u8, Message)>,
    number: u64,
    rng: StdRng,
    loss: f64,
    changes: usize,
}

impl Net {
    fn new(n: u8, seed: u64, loss: f64) -> Self {
        let mut net = Self {
            now: Time(0),
            nodes: (0..n).map(|i| Routes::new(host(i), seed + u64::from(i), Time(0))).collect(),
            queue: BTreeMap::new(),
            number: 0,
            rng: StdRng::seed_from_u64(seed),
            loss,
            changes: 0,
        };
        for i in 0..n {
            net.nodes[usize::from(i)].set_peers((0..n).map(host));
            net.settle(i);
        }
        net
    }

    fn settle(&mut self, i: u8) {
        while let Some(output) = self.nodes[usize::from(i)].poll_output() {
            let Output::Send { to, message } = output else {
                self.changes += 1;
                continue;
            };
            for _ in 0..self.rng.random_range(1..=2) {
                if !self.rng.random_bool(self.loss) {
                    let at = self.now.plus_ms(self.rng.random_range(1..100));
                    self.number += 1;
                    self.queue.insert((at, self.number), (i, to.0[0], message.clone()));
                }
            }
        }
    }

    fn put(&mut self, i: u8, route: Route) {
        self.nodes[usize::from(i)].put(route).unwrap();
        self.settle(i);
    }

    fn run(&mut self, ms: u64) {
        let end = self.now.plus_ms(ms);
        loop {
            let timer = self.nodes.iter().filter_map(Routes::poll_timeout).min();
            let event = self.queue.keys().next().copied();
            let next = timer.into_iter().chain(event.map(|e| e.0)).min();
            let Some(next) = next.filter(|t| *t <= end) else { break };
            self.now = self.now.max(next);
            if let Some(key) = event.filter(|e| e.0 <= self.now) {
                let (from, to, message) = self.queue.remove(&key).unwrap();
                self.nodes[usize::from(to)].handle(host(from), message);
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

    fn same(&self) -> bool {
        self.nodes.windows(2).all(|w| w[0].table == w[1].table && w[0].digest == w[1].digest)
    }
}

#[test]
fn a_change_is_pushed_to_every_peer() {
    let mut net = Net::new(5, 1, 0.0);
    net.run(200);
    net.put(2, route(1, 2, 1));
    net.run(100);
    assert!(net.same());
    assert_eq!(net.changes, 5, "each node says so once");
    assert_eq!(net.nodes[4].by_mac(&wire(), mac(1)).map(|r| r.host), Some(host(2)));
    assert_eq!(net.nodes[4].by_mac(&wire(), mac(2)), None);
    assert_eq!(net.nodes[0].of_host(host(2)).count(), 1);
    net.put(3, route(1, 3, 2));
    net.run(100);
    assert_eq!(net.nodes[0].of_host(host(2)).count(), 0);
    assert_eq!(net.nodes[0].by_name("vm-1").map(|r| r.host), Ok(host(3)));
}

#[test]
fn whose_senders_turn_is_told_first_and_then_everybody_else() {
    let apart = |i: u32, at: u8| Route {
        nics: vec![Nic { wire: "dmz".parse().unwrap(), mac: mac(i) }],
        ..route(i, at, 1)
    };
    let mut a = Routes::new(host(0), 1, Time(0));
    a.put(route(1, 3, 1)).unwrap();
    a.put(route(2, 5, 1)).unwrap();
    a.put(Route { gone: true, ..route(2, 5, 2) }).unwrap();
    a.put(route(3, 6, 1)).unwrap();
    a.put(apart(4, 2)).unwrap();
    a.set_peers((0..8).map(host));
    let mut told = |route: Route| {
        while a.poll_output().is_some() {}
        a.put(route).unwrap();
        let to = |output| match output {
            Output::Send { to, .. } => Some(to.0[0]),
            Output::Changed(_) => None,
        };
        std::iter::from_fn(|| a.poll_output()).filter_map(to).collect::<Vec<_>>()
    };
    assert_eq!(told(route(1, 0, 2)), [3, 6, 1, 2, 4, 5, 7], "3 had it, 6 is on its wire");
    assert_eq!(told(Route { nics: Vec::new(), ..route(1, 0, 3) }), [6, 1, 2, 3, 4, 5, 7]);
    assert_eq!(told(Route { epoch: Epoch(4), ..apart(1, 0) }), [2, 1, 3, 4, 5, 6, 7]);
    assert_eq!(told(Route { epoch: Epoch(5), ..apart(1, 7) }), [2, 7, 1, 3, 4, 5, 6]);
}

#[test]
fn the_higher_epoch_wins_in_any_order_and_tombstones_stay() {
    let gone = Route { gone: true, ..route(1, 3, 3) };
    let mut a = Routes::new(host(0), 1, Time(0));
    assert_eq!(a.put(route(1, 2, 2)), Ok(true));
    assert_eq!(a.put(route(1, 1, 1)), Ok(false));
    assert_eq!(a.put(route(1, 9, 2)), Ok(false), "an epoch has one entry");
    assert_eq!(a.get(vm(1)).map(|r| r.host), Some(host(2)));
    assert_eq!(a.put(gone.clone()), Ok(true));
    assert_eq!(a.put(route(1, 2, 2)), Ok(false), "nothing comes back");
    assert_eq!(a.get(vm(1)), Some(&gone));
    assert_eq!(a.by_name("vm-1"), Err(NameError::Unknown("vm-1".into())));
    assert_eq!(a.by_name(&vm(1).to_string()), Err(NameError::Unknown(vm(1).to_string())));
    assert_eq!((a.by_mac(&wire(), mac(1)), a.of_host(host(3)).count()), (None, 0));
}

#[test]
fn a_name_that_two_vms_have_is_ambiguous() {
    let mut a = Routes::new(host(0), 1, Time(0));
    for i in [1, 2] {
        a.put(Route { name: "web".parse().unwrap(), ..route(i, 1, 1) }).unwrap();
    }
    let error = a.by_name("web").unwrap_err();
    let text = error.to_string();
    assert!(text.contains(&vm(1).to_string()) && text.contains(&vm(2).to_string()), "{text}");
    assert_eq!(a.by_name(&vm(2).to_string()).map(|r| r.vm), Ok(vm(2)));
    assert!(matches!(a.by_name("no name"), Err(NameError::Unknown(_))));
    a.put(Route { gone: true, name: "web".parse().unwrap(), ..route(1, 1, 2) }).unwrap();
    assert_eq!(a.by_name("web").map(|r| r.vm), Ok(vm(2)));
}

#[test]
fn a_joining_node_gets_the_table_at_once() {
    let mut net = Net::new(2, 1, 0.0);
    for i in 0..100 {
        net.put(0, route(i, 0, 1));
    }
    net.run(200);
    net.nodes[1] = Routes::new(host(1), 9, net.now);
    net.nodes[1].set_peers([host(0), host(1)]);
    net.settle(1);
    net.run(400);
    assert!(net.same());
    assert_eq!(net.nodes[1].iter().count(), 100);
}

#[test]
fn large_tables_cross_in_messages_within_the_limit() {
    let mut a = Routes::new(host(0), 1, Time(0));
    let mut b = Routes::new(host(1), 2, Time(0));
    let long: Name = "n".repeat(63).parse().unwrap();
    let count = 2 * ROUTES_PER_HAVE as u32 + 5;
    for i in 0..count {
        let nics = (0..NICS as u32).map(|n| Nic { wire: long.clone(), mac: mac(i * 8 + n) });
        let nics = nics.collect();
        a.put(Route { name: long.clone(), nics, epoch: Epoch(u64::MAX), ..route(i, 0, 1) })
            .unwrap();
        if i % 3 == 0 {
            b.put(route(i + count, 1, 1)).unwrap();
        }
    }
    while a.poll_output().is_some() || b.poll_output().is_some() {}
    b.set_peers([host(0)]);
    let mut messages = 0;
    loop {
        let (x, y) = (a.poll_output(), b.poll_output());
        if x.is_none() && y.is_none() {
            break;
        }
        for (output, to, from) in [(x, &mut b, host(0)), (y, &mut a, host(1))] {
            let Some(Output::Send { message, .. }) = output else { continue };
            messages += 1;
            let bytes = encode(&Control::Route(message.clone()), CONTROL_MESSAGE_BYTES);
            assert!(bytes.is_ok(), "{bytes:?}");
            to.handle(from, message);
        }
    }
    assert!(messages > 20, "{messages}");
    assert_eq!(a.digest, b.digest);
    assert_eq!(a.table, b.table);
}

#[test]
fn limits_are_kept() {
    let mut a = Routes::new(host(0), 1, Time(0));
    let nics = vec![Nic { wire: wire(), mac: mac(1) }; NICS + 1];
    let crowd = Route { nics, ..route(1, 0, 1) };
    assert_eq!(a.put(crowd.clone()), Err(RouteError::Nics { vm: vm(1), nics: NICS + 1 }));
    a.handle(host(1), Message::Push(vec![crowd]));
    for i in 0..ROUTES as u32 {
        assert_eq!(a.put(route(i, 0, 1)), Ok(true));
    }
    assert_eq!(a.put(route(ROUTES as u32, 0, 1)), Err(RouteError::Full));
    assert_eq!(a.put(route(7, 1, 2)), Ok(true), "what is held can still change");
    let (first, last) = (VmId([9; 16]), VmId([1; 16]));
    a.handle(host(1), Message::Have { first, last, held: Vec::new() });
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, failure_persistence: None, ..Default::default() })]
    #[test]
    fn tables_converge_whatever_is_lost(seed in 0_u64..u64::MAX / 2) {
        let mut net = Net::new(6, seed, 0.4);
        let mut newest = BTreeMap::new();
        for _ in 0..60 {
            let (i, at) = (net.rng.random_range(0..10), net.rng.random_range(0..6));
            let epoch = newest.entry(i).and_modify(|e| *e += 1).or_insert(1);
            let gone = net.rng.random_bool(0.1);
            let new = Route { gone, ..route(i, at, *epoch) };
            net.put(at, new);
            let ms = net.rng.random_range(0..300);
            net.run(ms);
        }
        net.run(60_000);
        prop_assert!(net.same());
        for (i, epoch) in newest {
            prop_assert_eq!(net.nodes[0].get(vm(i)).map(|r| r.epoch.0), Some(epoch));
        }
    }
}
