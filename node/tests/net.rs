//! Nodes of a swarm on loopback: who gets in, who stays out, and what flows between members.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use futures::{AsyncReadExt, StreamExt};
use godwit::net::certificate::{Certificate, Signed, SignedCertificate};
use godwit::net::hello::{self, Hello};
use godwit::net::identity::{Identity, peer_of};
use godwit::net::keys::{AUTHORITY_KEY, NODE_KEY, SWARM_FILE, StateDir, TOKENS_FILE};
use godwit::net::roster::{MemberRecord, Roster};
use godwit::net::{self, AdmissionError, Net, NetConfig, NetError, NetEvent, Payload, SendError};
use godwit_protocol::id::{HostId, Name, StoreId};
use godwit_protocol::wire::control::Control;
use libp2p::swarm::dial_opts::DialOpts;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::time::timeout;

const PATIENCE: Duration = Duration::from_secs(60);
const HOUR: Duration = Duration::from_secs(3600);

fn name(text: &str) -> Name {
    text.parse().unwrap()
}

fn config(dir: &Path) -> NetConfig {
    let mut config = NetConfig::new(dir.to_owned(), "127.0.0.1:0".parse().unwrap());
    config.store = Some(StoreId([7; 16]));
    config
}

async fn start(dir: &TempDir) -> Net {
    Net::start(config(dir.path())).await.unwrap()
}

fn first(label: &str) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    net::init(dir.path(), name("paris"), name(label)).unwrap();
    dir
}

async fn joined(issuer: &Net, label: &str) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let token = issuer.handle.mint_token(HOUR, false).await.unwrap();
    net::join(&token, dir.path(), name("tokyo"), name(label)).await.unwrap();
    dir
}

/// Waits for the first event that `pick` takes; the others are passed over.
async fn wait<T>(net: &mut Net, what: &str, pick: impl Fn(&NetEvent) -> Option<T>) -> T {
    let found = timeout(PATIENCE, async {
        loop {
            let event = net.events.recv().await.expect("the adapter ended");
            if let Some(found) = pick(&event) {
                return found;
            }
        }
    });
    found.await.unwrap_or_else(|_| panic!("no {what} in time"))
}

async fn connected(net: &mut Net, host: HostId) {
    if net.handle.member(host).is_some_and(|m| m.connected) {
        return;
    }
    wait(net, "connection", |e| (*e == NetEvent::Connected(host)).then_some(())).await;
}

async fn until(what: &str, mut ready: impl FnMut() -> bool) {
    let polled = timeout(PATIENCE, async {
        while !ready() {
            // The state of other tasks is looked at again.
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    });
    polled.await.unwrap_or_else(|_| panic!("{what}: not in time"));
}

async fn message_flows(from: &mut Net, to: &mut Net, byte: u8) {
    connected(from, to.handle.me()).await;
    connected(to, from.handle.me()).await;
    let (msg, target) = (Control::Membership(vec![byte; 3]), to.handle.me());
    let expected = NetEvent::Message { from: from.handle.me(), msg: Box::new(msg.clone()) };
    // Not confirmed: one is lost with a stream that gives way to another, as when both ends dialled at once.
    let sender = async {
        loop {
            let _ = from.handle.send(target, msg.clone());
            // The pace of sending.
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    };
    tokio::select! {
        () = wait(to, "message", |e| (*e == expected).then_some(())) => {}
        () = sender => unreachable!(),
    }
}

/// Echoes one connection's bytes.
async fn bulk_flows(from: &Net, to: &mut Net) {
    let mut out = from.bulk.connect(to.handle.me()).await.unwrap();
    let (host, mut inside) = timeout(PATIENCE, to.bulk_inbound.recv()).await.unwrap().unwrap();
    assert_eq!((host, inside.peer()), (from.handle.me(), from.handle.me()));
    assert_eq!(out.peer(), to.handle.me());
    let sent: Vec<u8> = (0..3_000_000_u32).map(|i| (i % 251) as u8).collect();
    let write = async {
        out.write_all(&sent).await.unwrap();
        out.shutdown().await.unwrap();
    };
    let mut got = Vec::new();
    let (_, read) = tokio::join!(write, inside.read_to_end(&mut got));
    read.unwrap();
    assert!(got == sent, "bytes changed on the way");
}

async fn frame_flows(from: &Net, to: &mut Net, len: usize) {
    let frame: Vec<u8> = (0..len).map(|i| (i % 253) as u8).collect();
    let target = to.handle.me();
    // Datagrams: one may be lost while a restarted peer's old connection dies.
    let sender = async {
        loop {
            from.frames.send(target, 42, &frame).unwrap();
            // The pace of sending.
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    };
    let receiver = async {
        loop {
            let got = to.frames_inbound.recv().await.expect("frames ended");
            if let (host, tag, Payload::Frame(bytes)) = got
                && bytes.len() == len
            {
                return (host, tag, bytes);
            }
        }
    };
    let got = tokio::select! {
        got = timeout(PATIENCE, receiver) => got.expect("no frame"),
        () = sender => unreachable!(),
    };
    assert_eq!((got.0, got.1), (from.handle.me(), 42));
    assert_eq!(&got.2[..], &frame[..]);
    // What is said behind a frame comes behind it.
    from.frames.send(target, 43, &frame).unwrap();
    from.frames.mark(target, 43, b"flipped").unwrap();
    let mut last = Vec::new();
    while last.len() < 2 {
        let next = timeout(PATIENCE, to.frames_inbound.recv()).await.expect("no marker").unwrap();
        last.extend((next.1 == 43).then_some(next.2));
    }
    assert_eq!(last, [Payload::Frame(frame.into()), Payload::Marker(b"flipped"[..].into())]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_nodes_talk_in_all_three_classes_and_survive_restarts() {
    let dir_a = first("a");
    let mut a = start(&dir_a).await;
    let dir_b = joined(&a, "b").await;
    let dir_c = joined(&a, "c").await;
    let (mut b, mut c) = (start(&dir_b).await, start(&dir_c).await);
    message_flows(&mut a, &mut b, 1).await;
    message_flows(&mut c, &mut a, 2).await;
    // b and c were never told of each other but by a.
    message_flows(&mut b, &mut c, 3).await;
    message_flows(&mut c, &mut b, 4).await;
    bulk_flows(&b, &mut c).await;
    frame_flows(&b, &mut c, 60).await;
    frame_flows(&c, &mut b, 1514).await;
    frame_flows(&c, &mut b, 9014).await;
    let rtt = b.handle.probe(c.handle.me(), PATIENCE).await.expect("no answer to a ping");
    assert!(rtt < PATIENCE, "{rtt:?}");
    let info = b.handle.member(c.handle.me()).unwrap();
    assert_eq!((info.name, info.site), (name("c"), name("tokyo")));
    assert_eq!(info.store, Some(StoreId([7; 16])));
    assert!(!info.revoked && info.connected && info.rtt_ms.unwrap() < PATIENCE.as_secs_f64() * 1e3);

    for (dir, files) in [
        (&dir_a, [NODE_KEY, AUTHORITY_KEY, SWARM_FILE, TOKENS_FILE].as_slice()),
        (&dir_b, [NODE_KEY, SWARM_FILE].as_slice()),
    ] {
        for file in files {
            let mode = std::fs::metadata(dir.path().join(file)).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600, "{file}");
        }
    }

    let (b_id, key) = (b.handle.me(), b.handle.chunk_key());
    assert_eq!(key, a.handle.chunk_key());
    b.handle.shutdown().await;
    drop(b);
    let lost = |e: &NetEvent| (*e == NetEvent::Disconnected(b_id)).then_some(());
    wait(&mut a, "disconnection", lost).await;
    wait(&mut c, "disconnection", lost).await;
    assert!(matches!(
        c.handle.send(b_id, Control::Membership(vec![])),
        Err(SendError::NotConnected(_))
    ));
    let mut b = start(&dir_b).await;
    assert_eq!((b.handle.me(), b.handle.chunk_key()), (b_id, key));
    assert_eq!(b.handle.members().len(), 3);
    message_flows(&mut b, &mut c, 5).await;
    message_flows(&mut a, &mut b, 6).await;
    bulk_flows(&c, &mut b).await;
    frame_flows(&c, &mut b, 200).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tokens_are_used_once_in_time_and_whole() {
    let dir_a = first("a");
    let a = start(&dir_a).await;
    let token = a.handle.mint_token(HOUR, false).await.unwrap();
    let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let join = |dir: &TempDir, token: String, label: &str| {
        let (path, label) = (dir.path().to_owned(), name(label));
        async move { net::join(&token, &path, name("x"), label).await.map_err(|e| e.to_string()) }
    };
    join(&one, token.clone(), "one").await.unwrap();
    let again = join(&one, token.clone(), "one").await.unwrap_err();
    assert!(again.contains("already"), "{again}");
    let used = join(&two, token.clone(), "two").await.unwrap_err();
    assert!(used.contains("used already"), "{used}");
    assert!(!two.path().join(SWARM_FILE).exists());
    let cut = join(&two, token[..token.len() - 2].to_owned(), "two").await.unwrap_err();
    assert!(cut.contains("no token"), "{cut}");

    let short = a.handle.mint_token(Duration::from_secs(1), false).await.unwrap();
    // The token's own life passes: it counts whole seconds.
    tokio::time::sleep(Duration::from_millis(2100)).await;
    let expired = join(&two, short, "two").await.unwrap_err();
    assert!(expired.contains("expired"), "{expired}");

    let fresh = a.handle.mint_token(HOUR, false).await.unwrap();
    let taken = join(&two, fresh.clone(), "a").await.unwrap_err();
    assert!(taken.contains("--name"), "{taken}");
    // The refused name did not burn the token.
    join(&two, fresh, "two").await.unwrap();

    let late = a.handle.mint_token(HOUR, false).await.unwrap();
    a.handle.shutdown().await;
    let third = tempfile::tempdir().unwrap();
    let down = join(&third, late, "three").await.unwrap_err();
    assert!(down.contains("cannot reach"), "{down}");
    let second_init = net::init(dir_a.path(), name("x"), name("y"));
    assert!(matches!(second_init, Err(AdmissionError::AlreadyMember(_))));
    let plain = net::mint_token(one.path(), HOUR, None, false).unwrap_err();
    assert!(matches!(plain, AdmissionError::NoAdmission(_)), "{plain}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_of_another_swarm_gets_nothing() {
    let (dir_a, dir_evil) = (first("a"), first("evil"));
    let mut a = start(&dir_a).await;
    // The other swarm's authority certifies our host too, so that its nodes dial us.
    let state = StateDir::create(dir_evil.path()).unwrap();
    let mut evil_roster = Roster::load(&state).unwrap().unwrap();
    let ours = Roster::load(&StateDir::create(dir_a.path()).unwrap()).unwrap().unwrap();
    let us = ours.get(a.handle.me()).unwrap();
    let authority = Identity::load(&state, AUTHORITY_KEY).unwrap().unwrap();
    let said = Certificate { swarm: evil_roster.swarm(), ..us.certificate.clone() };
    let own = Signed::certificate(&authority, &said).unwrap();
    let certificate = SignedCertificate { own, admitter: None };
    let contact = us.record.contact.clone();
    evil_roster.merge(MemberRecord { certificate, contact }).unwrap();
    evil_roster.save(&state).unwrap();

    let evil = start(&dir_evil).await;
    let target = a.handle.me();
    let bulk = evil.bulk.connect(target).await.unwrap_err().to_string();
    assert!(bulk.contains("no bulk connection"), "{bulk}");
    let end = tokio::time::Instant::now() + Duration::from_secs(4);
    while tokio::time::Instant::now() < end {
        evil.frames.send(target, 1, b"hello").ok();
        let sent = evil.handle.send(target, Control::Membership(vec![1]));
        assert!(sent.is_err(), "a control stream with a stranger");
        // The pace of trying.
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(a.frames_inbound.try_recv().is_err(), "a frame of a stranger");
    assert!(a.bulk_inbound.try_recv().is_err(), "a bulk connection of a stranger");
    assert!(a.events.try_recv().is_err(), "an event of a stranger");
    assert_eq!(a.handle.members().len(), 1);
    assert!(!a.handle.admitted(evil.handle.me()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fresh_key_gets_not_one_byte_on_the_control_stream() {
    let dir_a = first("a");
    let a = start(&dir_a).await;
    let us = a.handle.member(a.handle.me()).unwrap();
    let stranger = Identity::generate();
    let mut swarm = libp2p::SwarmBuilder::with_existing_identity(stranger.keypair())
        .with_tokio()
        .with_quic()
        .with_behaviour(|_| libp2p_stream::Behaviour::new())
        .unwrap()
        .build();
    let peer = peer_of(a.handle.me()).unwrap();
    let port = us.addresses[0].port();
    let address = format!("/ip4/127.0.0.1/udp/{port}/quic-v1").parse().unwrap();
    let address: libp2p::Multiaddr = address;
    let dial = DialOpts::peer_id(peer).addresses(vec![address]).build();
    swarm.dial(dial).unwrap();
    while !swarm.is_connected(&peer) {
        timeout(PATIENCE, swarm.select_next_some()).await.expect("no connection");
    }
    let mut control = swarm.behaviour().new_control();
    let driver = tokio::spawn(async move {
        loop {
            swarm.select_next_some().await;
        }
    });
    let protocol = libp2p::StreamProtocol::new("/godwit/control/1");
    let mut stream = timeout(PATIENCE, control.open_stream(peer, protocol)).await.unwrap().unwrap();
    // What was signed by nobody, for this very swarm.
    let own = Signed { body: vec![1; 60], signature: vec![2; 64] };
    let member =
        MemberRecord { certificate: SignedCertificate { own, admitter: None }, contact: None };
    let swarm_id = a.handle.swarm();
    let said = Hello { swarm: swarm_id, instance: 1, member, store: None };
    let version = godwit_protocol::wire::codec::WIRE_VERSION;
    hello::write_hello(&mut stream, version, &said).await.unwrap();
    let mut got = Vec::new();
    let _ = timeout(PATIENCE, stream.read_to_end(&mut got)).await.expect("the stream stays open");
    assert!(got.is_empty(), "{} bytes to a stranger", got.len());
    driver.abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_revoked_member_is_cut_off_everywhere_and_for_ever() {
    let dir_a = first("a");
    let mut a = start(&dir_a).await;
    let (dir_b, dir_c) = (joined(&a, "b").await, joined(&a, "c").await);
    let (mut b, mut c) = (start(&dir_b).await, start(&dir_c).await);
    message_flows(&mut a, &mut b, 1).await;
    message_flows(&mut c, &mut b, 2).await;
    frame_flows(&c, &mut b, 100).await;
    let mut out = b.bulk.connect(c.handle.me()).await.unwrap();
    let (_, mut inside) = timeout(PATIENCE, c.bulk_inbound.recv()).await.unwrap().unwrap();
    out.write_all(b"x").await.unwrap();
    inside.read_exact(&mut [0]).await.unwrap();

    let gone = b.handle.me();
    let refused = c.handle.revoke(gone).await.unwrap_err();
    assert!(matches!(refused, AdmissionError::NoAuthority(_)), "{refused}");
    a.handle.revoke(gone).await.unwrap();
    let revoked = |e: &NetEvent| (*e == NetEvent::Revoked(gone)).then_some(());
    for (net, what) in [(&mut b, "word to b"), (&mut c, "word to c")] {
        wait(net, what, revoked).await;
    }
    let cut = timeout(PATIENCE, inside.read(&mut [0; 8])).await.expect("bulk stays open");
    assert!(matches!(cut, Err(_) | Ok(0)));
    until("cut", || !c.handle.member(gone).unwrap().connected).await;
    assert!(c.handle.member(gone).unwrap().revoked);
    assert!(c.frames.send(gone, 1, b"x").is_err());
    assert!(c.bulk.connect(gone).await.is_err());
    assert_eq!(c.handle.send(gone, Control::Membership(vec![])), Err(SendError::NotMember(gone)));
    // The revoked node cannot start again, and the others remember after a restart.
    b.handle.shutdown().await;
    drop(b);
    assert!(matches!(Net::start(config(dir_b.path())).await, Err(NetError::Revoked)));
    c.handle.shutdown().await;
    drop(c);
    let c = start(&dir_c).await;
    assert!(c.handle.member(gone).unwrap().revoked && !c.handle.admitted(gone));
    assert!(c.frames.send(gone, 1, b"x").is_err());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_wire_version_is_one_clear_event_on_each_side() {
    let dir_a = first("a");
    let mut a = start(&dir_a).await;
    let dir_b = joined(&a, "b").await;
    let mut other = config(dir_b.path());
    other.wire_version += 1;
    let mut b = Net::start(other).await.unwrap();
    let version = godwit_protocol::wire::codec::WIRE_VERSION;
    for (net, ours, theirs) in [(&mut a, version, version + 1), (&mut b, version + 1, version)] {
        wait(net, "mismatch", |e| match e {
            NetEvent::VersionMismatch { ours: o, theirs: t, .. } => {
                assert_eq!((*o, *t), (ours, theirs));
                Some(())
            }
            NetEvent::Connected(_) => panic!("connected in spite of the version"),
            _ => None,
        })
        .await;
    }
    // Left alone: no second event, no connection.
    let more = timeout(Duration::from_secs(4), a.events.recv()).await;
    assert!(more.is_err(), "{more:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_that_leaves_is_gone_for_good_and_may_join_anew() {
    let dir_a = first("a");
    let mut a = start(&dir_a).await;
    let dir_b = joined(&a, "b").await;
    let mut b = start(&dir_b).await;
    message_flows(&mut a, &mut b, 1).await;
    let refused = a.handle.leave().await.unwrap_err();
    assert!(matches!(refused, AdmissionError::LastAuthority), "{refused}");
    let old = b.handle.me();
    b.handle.leave().await.unwrap();
    wait(&mut a, "leave", |e| (*e == NetEvent::Revoked(old)).then_some(())).await;
    assert!(!dir_b.path().join(NODE_KEY).exists() && !dir_b.path().join(SWARM_FILE).exists());
    assert!(matches!(
        Net::start(config(dir_b.path())).await,
        Err(NetError::Admission(AdmissionError::NoMember))
    ));
    let token = a.handle.mint_token(HOUR, true).await.unwrap();
    net::join(&token, dir_b.path(), name("tokyo"), name("b")).await.unwrap();
    let mut b = start(&dir_b).await;
    assert_ne!(b.handle.me(), old);
    message_flows(&mut a, &mut b, 2).await;
    // b may admit now, though it does not hold the authority key.
    let dir_c = joined(&b, "c").await;
    let mut c = start(&dir_c).await;
    message_flows(&mut c, &mut a, 3).await;
}

/// Passes TCP connections on to `target`; nothing answers UDP on its port.
async fn tcp_only(target: std::net::SocketAddr) -> std::net::SocketAddr {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut near, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut far = tokio::net::TcpStream::connect(target).await.unwrap();
                let _ = tokio::io::copy_bidirectional(&mut near, &mut far).await;
            });
        }
    });
    address
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn where_udp_does_not_pass_join_and_control_go_over_tcp() {
    let dir_a = first("a");
    // Three ports in a row; another process may hold one of them.
    let mut found = None;
    for port in (21_000..22_000).step_by(7) {
        let mut config = config(dir_a.path());
        config.listen = ([127, 0, 0, 1], port).into();
        config.advertise = Some(tcp_only(config.listen).await);
        if let Ok(net) = Net::start(config).await {
            found = Some(net);
            break;
        }
    }
    let mut a = found.expect("no three free ports");
    let dir_b = joined(&a, "b").await;
    let mut config = config(dir_b.path());
    // Nobody reaches b, so the one stream is the one that b dials.
    config.advertise = Some("127.0.0.1:1".parse().unwrap());
    let mut b = Net::start(config).await.unwrap();
    message_flows(&mut b, &mut a, 1).await;
    message_flows(&mut a, &mut b, 2).await;
}
