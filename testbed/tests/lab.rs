//! The lab against the real kernel. Needs root; without it each test says so and ends.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use godwit_testbed::lab::check::{self, pair_lab};
use godwit_testbed::lab::cleanup::{self, leftovers};
use godwit_testbed::lab::node::Node;
use godwit_testbed::lab::ns::NetNs;
use godwit_testbed::lab::prober::{ProbeConfig, Prober, Station, StationLink, receive_buffer};
use godwit_testbed::lab::wan::{LinkParams, WanMode};
use godwit_testbed::lab::{Lab, LabConfig, SiteConfig};

fn no_root() -> bool {
    let skip = !nix::unistd::geteuid().is_root();
    if skip {
        println!("skipped: network namespaces need root");
    }
    skip
}

fn root_devices() -> String {
    let text = std::fs::read_to_string("/proc/net/dev").unwrap();
    text.lines()
        .filter_map(|line| Some(line.split_once(':')?.0.trim()))
        .collect::<Vec<_>>()
        .join(" ")
}

#[test]
fn wan_keeps_delay_counts_loss_and_cut() {
    if no_root() {
        return;
    }
    let params = LinkParams::new(100, 80);
    let lab = pair_lab("twan", WanMode::Shaped(params.clone())).unwrap();
    let (a, b) = (lab.host("a").unwrap(), lab.host("b").unwrap());
    // How exact the delay is on a quiet machine is for `wan-check`; here it is a fact that it is there.
    let rtt = check::check_delay(a, b, &params).unwrap()["median_rtt_ms"].as_f64().unwrap();
    assert!((79.9..160.0).contains(&rtt), "{rtt} ms");
    for part in [
        check::check_counters(&lab, a, b),
        check::check_loss(&lab, a, b),
        check::check_cut(&lab, a, b),
    ] {
        let part = part.unwrap();
        assert!(part["passed"] == true, "{part:#}");
    }
    // The checks can fail: a wrong delay, an unexpected loss.
    let wrong = LinkParams::new(100, 200);
    assert_eq!(check::check_delay(a, b, &wrong).unwrap()["passed"], false);
    lab.wan().unwrap().set_loss(0.02);
    assert_eq!(check::check_counters(&lab, a, b).unwrap()["passed"], false);
    lab.teardown().unwrap();
    assert!(leftovers("twan").unwrap().is_empty());
}

#[test]
fn wan_gives_tcp_its_rate() {
    if no_root() {
        return;
    }
    let params = LinkParams::new(100, 80);
    let lab = pair_lab("trate", WanMode::Shaped(params.clone())).unwrap();
    let (a, b) = (lab.host("a").unwrap(), lab.host("b").unwrap());
    let (ramp, measure) = (Duration::from_secs(2), Duration::from_secs(3));
    let rate = check::check_rate(&lab, a, b, &params, ramp, measure).unwrap();
    assert!(rate["passed"] == true, "{rate:#}");
}

#[test]
fn parameters_change_at_run_time() {
    if no_root() {
        return;
    }
    let lab = pair_lab("tset", WanMode::Shaped(LinkParams::new(100, 10))).unwrap();
    let (a, b) = (lab.host("a").unwrap(), lab.host("b").unwrap());
    let near = check::udp_rtt_ms(a, b, 9).unwrap();
    lab.wan().unwrap().set_delay(30_000);
    let far = check::udp_rtt_ms(a, b, 9).unwrap();
    // A busy machine adds to it; which of the delays it is stays clear.
    assert!((9.9..29.9).contains(&near) && (59.9..200.0).contains(&far), "{near} {far}");
    lab.wan()
        .unwrap()
        .link("tokyo", "paris")
        .unwrap()
        .set_towards("tokyo", |link| link.delay_us = 0);
    let half = check::udp_rtt_ms(a, b, 9).unwrap();
    assert!((29.9..59.9).contains(&half), "{half}");
}

#[test]
fn three_sites_each_pair_has_its_link() {
    if no_root() {
        return;
    }
    for (labid, wan) in
        [("tthree", WanMode::Shaped(LinkParams::new(100, 100))), ("tthreeu", WanMode::Unshaped)]
    {
        let sites = vec![
            SiteConfig::new("paris", &["h1", "h4"]),
            SiteConfig::new("tokyo", &["h2"]),
            SiteConfig::new("lima", &["h3"]),
        ];
        let shaped = wan != WanMode::Unshaped;
        let lab = Lab::new(&LabConfig { labid: labid.to_owned(), sites, wan }).unwrap();
        for (from, to, link) in [
            ("h1", "h2", Some(("paris", "tokyo"))),
            ("h3", "h1", Some(("paris", "lima"))),
            ("h2", "h3", Some(("tokyo", "lima"))),
            ("h1", "h4", None),
        ] {
            let before = lab.wan().unwrap().stats().unwrap().carried_bytes();
            let rtt = check::udp_rtt_ms(lab.host(from).unwrap(), lab.host(to).unwrap(), 5).unwrap();
            let after = lab.wan().unwrap().stats().unwrap().carried_bytes();
            assert_eq!(link.is_some(), after > before, "{from} {to}");
            assert_eq!(shaped && link.is_some(), rtt >= 100.0, "{from} {to} {rtt}");
            if let Some((a, b)) = link {
                assert!(
                    lab.wan().unwrap().link(a, b).unwrap().stats().unwrap().carried_bytes() > 0
                );
            }
        }
        let (h1, h2, h3) =
            (lab.host("h1").unwrap(), lab.host("h2").unwrap(), lab.host("h3").unwrap());
        lab.wan().unwrap().link("paris", "tokyo").unwrap().cut().unwrap();
        assert!(check::udp_rtt_ms(h1, h2, 1).is_err());
        assert!(check::udp_rtt_ms(h1, h3, 1).is_ok());
        lab.wan().unwrap().restore().unwrap();
        assert!(check::udp_rtt_ms(h1, h2, 1).is_ok());
        lab.teardown().unwrap();
    }
}

#[test]
fn congestion_control_of_both_ends_is_chosen_by_the_lab() {
    if no_root() {
        return;
    }
    let lab = pair_lab("tcong", WanMode::Unshaped).unwrap();
    let (a, b) = (lab.host("a").unwrap(), lab.host("b").unwrap());
    let name = |stream: &TcpStream| {
        let name = socket2::SockRef::from(stream).tcp_congestion().unwrap();
        String::from_utf8(name).unwrap().trim_end_matches('\0').to_owned()
    };
    for wanted in ["cubic", "reno", "cubic"] {
        lab.set_congestion_control(wanted).unwrap();
        let listener = b.ns.run(|| TcpListener::bind((b.addr, 0))).unwrap().unwrap();
        let near =
            a.ns.run(|| TcpStream::connect(listener.local_addr().unwrap())).unwrap().unwrap();
        let (far, _) = listener.accept().unwrap();
        assert_eq!((name(&near), name(&far)), (wanted.to_owned(), wanted.to_owned()));
    }
    assert!(lab.set_congestion_control("nosuch").is_err());
}

/// A process that builds a lab and holds it, as a scenario would.
fn holder(labid: &str) -> Child {
    let mut child = Command::new(env!("CARGO_BIN_EXE_godwit-lab"))
        .args(["hold", labid])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap() == "ready"), "the lab {labid} was not built");
    child
}

/// Processes as a node would leave behind: one in a host, one that went on to a namespace of its own.
fn strays(labid: &str) -> Vec<Child> {
    let ns = NetNs::named(&format!("gw-{labid}-h1"));
    let inside = ns.command_outliving("sleep").arg("1000").spawn().unwrap();
    let outside = ns.command_outliving("unshare").args(["-n", "sleep", "1000"]).spawn().unwrap();
    vec![inside, outside]
}

#[test]
fn a_second_run_removes_what_a_killed_one_left() {
    if no_root() {
        return;
    }
    let devices = root_devices();
    let mut lab = holder("tkill");
    let mut children = strays("tkill");
    assert_eq!(root_devices(), devices, "the lab made a device in the root namespace");
    std::fs::write(cleanup::run_dir("tkill").join("h1/state/file"), "left").unwrap();
    let busy = Lab::new(&LabConfig::demo("tkill")).err().unwrap();
    assert!(format!("{busy:#}").contains("in use"), "{busy:#}");

    lab.kill().unwrap();
    lab.wait().unwrap();
    let left = leftovers("tkill").unwrap();
    assert_eq!((left.pids.len(), left.namespaces.len()), (2, 5), "{left:?}");
    assert!(left.dir.is_some());

    let second = Lab::new(&LabConfig::demo("tkill")).unwrap();
    for child in &mut children {
        assert!(!child.wait().unwrap().success());
    }
    assert!(!second.dir().join("h1/state/file").exists());
    let mode = std::fs::metadata(second.dir()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o700);
    second.teardown().unwrap();
    assert!(leftovers("tkill").unwrap().is_empty());
    assert!(!cleanup::run_dir("tkill").with_extension("lock").exists());
    assert_eq!(root_devices(), devices);
}

#[test]
fn a_signal_removes_the_lab() {
    if no_root() {
        return;
    }
    let mut lab = holder("tsig");
    let mut children = strays("tsig");
    let pid = nix::unistd::Pid::from_raw(lab.id() as i32);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).unwrap();
    assert_eq!(lab.wait().unwrap().code(), Some(130));
    assert!(leftovers("tsig").unwrap().is_empty());
    assert!(!cleanup::run_dir("tsig").with_extension("lock").exists());
    for child in &mut children {
        assert!(!child.wait().unwrap().success());
    }
}

/// Not a test: the stand-in for `godwit run` that the next test starts.
#[test]
#[ignore = "started by node_is_started_killed_and_asked"]
fn stand_in() {
    let Some(socket) = std::env::var_os("STAND_IN_SOCKET").map(PathBuf::from) else {
        return;
    };
    let _ = std::fs::remove_file(&socket);
    let listener = std::os::unix::net::UnixListener::bind(socket).unwrap();
    println!("stand-in is up");
    for connection in listener.incoming() {
        drop(connection);
    }
}

#[test]
fn node_is_started_killed_and_asked() {
    if no_root() {
        return;
    }
    let lab = pair_lab("tnode", WanMode::Unshaped).unwrap();
    let host = lab.host("a").unwrap();
    let program = host.work_dir.join("godwit");
    let test = std::env::current_exe().unwrap();
    let script = format!(
        "#!/bin/sh\n[ \"$1\" = run ] && exec {} --exact stand_in --ignored --nocapture\n\
         case \"$*\" in *fail*) echo 'no such host: fail' >&2; exit 3;; *slow*) exec sleep 60;; esac\n\
         echo \"{{\\\"args\\\": \\\"$*\\\"}}\"\n",
        test.display()
    );
    // By another process: a child that another test is just starting would have it open for writing, and it could not be run.
    let mut install = Command::new("install")
        .args(["-m", "755", "/dev/stdin"])
        .arg(&program)
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    install.stdin.take().unwrap().write_all(script.as_bytes()).unwrap();
    assert!(install.wait().unwrap().success());
    let mut node = Node::with_program(host, program);
    node.env("STAND_IN_SOCKET", node.socket().to_str().unwrap());
    let deadline = Duration::from_secs(60);

    // From a thread that ends at once: the daemon must outlive it.
    thread::scope(|scope| scope.spawn(|| node.start_ready(deadline).unwrap()).join()).unwrap();
    let first = node.pid().unwrap();
    let inode = std::fs::metadata(format!("/proc/{first}/ns/net")).unwrap();
    assert_eq!(std::os::unix::fs::MetadataExt::ino(&inode), host.ns.inode().unwrap());
    assert!(node.start().is_err(), "started twice");
    node.restart(deadline).unwrap();
    assert_ne!(node.pid().unwrap(), first);
    assert!(node.log_tail().matches("stand-in is up").count() == 2, "{}", node.log_tail());

    let answer = node.cli_json(&["hosts"], deadline).unwrap();
    let expected = format!("--state {} hosts --json", host.state_dir.display());
    assert_eq!(answer["args"], expected);
    let error = format!("{:#}", node.cli_json(&["fail"], deadline).unwrap_err());
    assert!(error.contains("no such host: fail") && error.contains('3'), "{error}");
    assert!(node.cli(&["slow"], Duration::from_millis(300)).is_err());
    node.kill9().unwrap();
    assert!(node.wait_ready(Duration::from_millis(100)).is_err());
}

#[test]
fn prober_reaches_a_wire_through_its_bridge() {
    if no_root() {
        return;
    }
    let lab = pair_lab("tprobe", WanMode::Unshaped).unwrap();
    let host = lab.host("a").unwrap();
    host.ns.batch(&["link add w0 type bridge".to_owned(), "link set w0 up".to_owned()]).unwrap();
    let link = |number: u8| StationLink {
        mac: format!("02:00:00:00:00:{number:02x}"),
        addr: [192, 168, 9, number].into(),
        prefix_len: 24,
        mtu: 1400,
    };
    let guest = Station::attach(&lab, host, "w0", 1, &link(1)).unwrap();
    let outside = Station::attach(&lab, host, "w0", 2, &link(2)).unwrap();
    let echo = guest.ns().run(|| UdpSocket::bind("192.168.9.1:7007")).unwrap().unwrap();
    receive_buffer(&echo).unwrap();
    echo.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let server = thread::spawn(move || {
        let mut datagram = [0; 2048];
        while let Ok((len, from)) = echo.recv_from(&mut datagram) {
            let _ = echo.send_to(&datagram[..len], from);
        }
    });
    let target = "192.168.9.1:7007".parse().unwrap();
    let config = ProbeConfig { target, rate_pps: 1000, size: 200 };
    let prober = Prober::start(Some(outside.ns()), &config).unwrap();
    assert!(prober.wait_unique(1000, Duration::from_secs(60)), "{:?}", prober.snapshot());
    let report = prober.stop(Duration::from_secs(2));
    assert_eq!((report.lost, report.duplicated, report.reordered), (0, 0, 0), "{report:?}");
    server.join().unwrap();
}
