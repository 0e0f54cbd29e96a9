//! A swarm of real nodes in a lab, and guests that run in it.
//!
//! Owns the order of bringing both up. Knows the command line of `godwit` and nothing of its inside.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::guest::disk::{DiskForm, SpecDisk};
use crate::guest::{
    Accel, GuestAddress, GuestControl, GuestFiles, GuestKind, SpecNic, VmSpec, vm_spec,
};
use crate::lab::node::Node;
use crate::lab::prober::{Station, StationLink};
use crate::lab::qemus::QemuWatch;
use crate::lab::{Lab, LabConfig};

/// How long a daemon may take until it answers.
const READY: Duration = Duration::from_secs(30);
/// How long a command may take that is not a move.
const COMMAND: Duration = Duration::from_secs(60);
/// How long a guest may take to boot under an emulated CPU.
const BOOT: Duration = Duration::from_secs(180);
/// The wire that guests of scenarios are on.
pub const WIRE: &str = "lan";
/// MTU of wires, bytes.
pub const MTU: u16 = 1400;

/// Nodes of a lab that have joined one swarm and run.
pub struct Swarm {
    /// Where they are.
    pub lab: Lab,
    nodes: Vec<Node>,
}

impl Swarm {
    /// Builds the lab, makes a swarm on its first host and lets the others join. `dress` may add arguments and
    /// environment to a node before it starts.
    pub fn up(config: &LabConfig, mut dress: impl FnMut(&mut Node)) -> Result<Self> {
        let lab = Lab::new(config)?;
        let mut nodes = Vec::new();
        for host in lab.hosts() {
            let mut node = Node::new(host)?;
            dress(&mut node);
            nodes.push(node);
        }
        let mut swarm = Self { lab, nodes };
        let [first, others @ ..] = swarm.nodes.as_mut_slice() else { bail!("a lab without hosts") };
        let (name, site) = (first.host().name.clone(), first.host().site.clone());
        expect(first, &["init", "--site", &site, "--name", &name])?;
        first.start_ready(READY)?;
        for node in others {
            let token = first.cli_json(&["token"], COMMAND)?;
            let token = token["token"].as_str().context("no token")?.to_owned();
            let (name, site) = (node.host().name.clone(), node.host().site.clone());
            expect(node, &["join", &token, "--site", &site, "--name", &name])?;
            node.start_ready(READY)?;
        }
        swarm.wait("every node is connected to every other", READY, |s| {
            for node in &s.nodes {
                let hosts = node.cli_json(&["hosts"], COMMAND)?;
                let alive = |h: &Value| h["state"] == "alive";
                if hosts.as_array().is_none_or(|h| h.len() < s.nodes.len() || !h.iter().all(alive))
                {
                    return Ok(false);
                }
            }
            Ok(true)
        })?;
        Ok(swarm)
    }

    /// The node of a host.
    pub fn node(&self, host: &str) -> Result<&Node> {
        let found = self.nodes.iter().find(|n| n.host().name == host);
        found.with_context(|| format!("no host {host} in this lab"))
    }

    /// The node of a host, to kill or restart it.
    pub fn node_mut(&mut self, host: &str) -> Result<&mut Node> {
        let found = self.nodes.iter_mut().find(|n| n.host().name == host);
        found.with_context(|| format!("no host {host} in this lab"))
    }

    /// All nodes.
    #[must_use]
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// `godwit ARGS --json` on a host.
    pub fn ask(&self, host: &str, args: &[&str]) -> Result<Value> {
        self.node(host)?.cli_json(args, COMMAND)
    }

    /// Looks every 50 ms until `seen` says yes.
    pub fn wait(
        &self,
        what: &str,
        deadline: Duration,
        mut seen: impl FnMut(&Self) -> Result<bool>,
    ) -> Result<()> {
        let end = Instant::now() + deadline;
        let mut last = None;
        while Instant::now() < end {
            match seen(self) {
                Ok(true) => return Ok(()),
                Ok(false) => last = None,
                Err(error) => last = Some(error),
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        let why = last.map_or_else(String::new, |e| format!(" (last: {e:#})"));
        bail!("not within {} s: {what}{why}{}", deadline.as_secs(), self.log_tails())
    }

    fn log_tails(&self) -> String {
        let tail = |n: &Node| format!("\n--- {} ---\n{}", n.host().name, n.log_tail());
        self.nodes.iter().map(tail).collect()
    }

    /// Starts a guest on a host, with its first NIC on [`WIRE`] if it can use one, and waits until its agent answers and as many
    /// voters decide on it as there are hosts (at most three).
    pub fn start_guest(&self, host: &str, files: &GuestFiles, plan: &GuestPlan) -> Result<Guest> {
        let root = self.lab.dir().join(format!("{}.img", plan.name));
        let mut disks = plan.disks.clone();
        if files.make_disk(&root, plan.root)? {
            disks.insert(0, SpecDisk { path: root, form: plan.root, shared: plan.root_shared });
        }
        let nic = SpecNic { wire: WIRE.into(), mac: Some(plan.mac()) };
        let address = GuestAddress { ip: plan.ip(), prefix: 24, mtu: Some(MTU) };
        let network = files.kind != GuestKind::Bare;
        let more = plan.more_wires.iter().map(|wire| SpecNic { wire: wire.clone(), mac: None });
        let spec = VmSpec {
            disks,
            nics: network.then_some(nic).into_iter().chain(more).collect(),
            address: network.then_some(address),
            accel: plan.accel,
            cpu: plan.cpu.clone(),
            machine: plan.machine.clone(),
            ..VmSpec::new(&plan.name, plan.memory_mib)
        };
        let path = self.lab.dir().join(format!("{}.toml", plan.name));
        std::fs::write(&path, vm_spec(files, &spec)?)?;
        let node = self.node(host)?;
        let path = path.to_str().context("path")?;
        let info = node.cli_json(&["vm", "run", path], BOOT)?;
        let guest = Guest { name: plan.name.clone(), plan: plan.clone() };
        let voters = self.nodes.len().min(3);
        let serial = serial1(&info)?;
        run(async { GuestControl::new(serial).wait_ready(BOOT).await })?;
        self.wait("the VM has its voters", READY, |s| {
            let info = s.ask(host, &["vm", "show", &plan.name])?;
            Ok(info["detail"]["voters"].as_array().is_some_and(|v| v.len() >= voters))
        })?;
        Ok(guest)
    }

    /// The guest's control channel on the host that runs it now.
    pub fn control(&self, host: &str, guest: &Guest) -> Result<GuestControl> {
        let info = self.ask(host, &["vm", "show", &guest.name])?;
        Ok(GuestControl::new(serial1(&info)?).with_deadline(Duration::from_secs(60)))
    }

    /// A station outside all guests, on [`WIRE`] of a host.
    pub fn station(&self, host: &str, number: u16) -> Result<Station> {
        self.station_on(host, WIRE, number)
    }

    /// A station outside all guests, on a wire of a host.
    pub fn station_on(&self, host: &str, wire: &str, number: u16) -> Result<Station> {
        let mac = format!("02:00:00:00:00:{number:02x}");
        let port = self.ask(host, &["wire", "port", wire, "--mac", &mac])?;
        let bridge = port["bridge"].as_str().context("no bridge")?.to_owned();
        let link = StationLink { mac, addr: station_ip(number)?, prefix_len: 24, mtu: MTU };
        Station::attach(&self.lab, self.lab.host(host)?, &bridge, number, &link)
    }

    /// Copies the nodes' logs, what is known of moves and what was seen of QEMUs to `$GODWIT_LAB_LOGS/CASE` if that is set.
    pub fn keep_logs(&self, case: &str, qemus: &QemuWatch) {
        let Some(dir) = std::env::var_os("GODWIT_LAB_LOGS") else { return };
        let dir = PathBuf::from(dir).join(case.replace([' ', '/'], "-"));
        let copy = || -> Result<()> {
            std::fs::create_dir_all(&dir)?;
            for node in self.nodes() {
                std::fs::copy(node.log_path(), dir.join(format!("{}.log", node.host().name)))?;
            }
            std::fs::write(dir.join("qemus"), format!("{:#?}", qemus.seen()))?;
            for node in self.nodes() {
                let name = &node.host().name;
                let moves = self.ask(name, &["migrations"])?;
                std::fs::write(dir.join(format!("{name}.json")), format!("{moves:#}"))?;
            }
            Ok(())
        };
        if let Err(error) = copy() {
            eprintln!("logs of {case} not kept: {error:#}");
        }
    }

    /// Stops the nodes and removes the lab.
    pub fn down(mut self) -> Result<()> {
        for node in &mut self.nodes {
            // The lab ends whatever is left.
            let _ = node.kill9();
        }
        self.lab.teardown()
    }
}

/// The address of a station, by its number (1 to 50).
pub fn station_ip(number: u16) -> Result<std::net::Ipv4Addr> {
    Ok(std::net::Ipv4Addr::new(10, 9, 0, u8::try_from(200 + number)?))
}

/// A guest that a scenario wants.
#[derive(Clone, Debug)]
pub struct GuestPlan {
    /// Its name.
    pub name: String,
    /// Its number on the wire, 1 to 199: address and MAC follow from it.
    pub number: u8,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// CPU model; `None` leaves it to the node.
    pub cpu: Option<String>,
    /// Machine type; `None` leaves it to the node.
    pub machine: Option<String>,
    /// Accelerator; `None` leaves it to the node.
    pub accel: Option<Accel>,
    /// Form of the disk that it starts from, if it does.
    pub root: DiskForm,
    /// Every host reaches that disk; otherwise it moves with the VM.
    pub root_shared: bool,
    /// Further disks, which exist.
    pub disks: Vec<SpecDisk>,
    /// Wires of further NICs.
    pub more_wires: Vec<String>,
}

impl GuestPlan {
    /// A guest that leaves everything to the node; a disk that it starts from is raw and its own.
    #[must_use]
    pub fn new(name: &str, number: u8, memory_mib: u32) -> Self {
        Self {
            name: name.to_owned(),
            number,
            memory_mib,
            cpu: None,
            machine: None,
            accel: None,
            root: DiskForm::Raw,
            root_shared: false,
            disks: Vec::new(),
            more_wires: Vec::new(),
        }
    }

    /// Its address on the wire.
    #[must_use]
    pub fn ip(&self) -> std::net::Ipv4Addr {
        std::net::Ipv4Addr::new(10, 9, 0, self.number)
    }

    /// Its MAC address.
    #[must_use]
    pub fn mac(&self) -> String {
        format!("52:54:00:09:00:{:02x}", self.number)
    }
}

/// A node that takes its host's LAN for trusted.
pub fn trusting(node: &mut Node) {
    let [a, b, c, _] = node.host().addr.octets();
    node.arg("--trusted-lan").arg(&format!("{a}.{b}.{c}.0/24"));
}

/// A guest that was started.
#[derive(Clone, Debug)]
pub struct Guest {
    /// Its name.
    pub name: String,
    /// What was wanted.
    pub plan: GuestPlan,
}

fn expect(node: &Node, args: &[&str]) -> Result<()> {
    let out = node.cli(args, COMMAND)?;
    if out.ok() {
        return Ok(());
    }
    bail!("godwit {} on {}: {}{}", args.join(" "), node.host().name, out.stdout, out.stderr)
}

/// Where the guest's control channel is, by `godwit vm show`.
pub fn serial1(info: &Value) -> Result<PathBuf> {
    let path =
        info["detail"]["serial1"].as_str().context("the VM has no second serial port here")?;
    Ok(Path::new(path).to_owned())
}

/// Runs the guest's asynchronous control from a scenario, which is not.
pub fn run<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(work)
}
