//! The lab: hosts as network namespaces in sites, sites joined by an emulated WAN, everything removed afterwards.
//!
//! Owns namespaces, devices, the run directory and the order in which they come and go. Never creates a device in the
//! root namespace, so labs with different ids do not meet. Invariant: whatever a lab made is found again by its id
//! alone ([`cleanup`]), on Drop, on SIGINT/SIGTERM/SIGHUP, and by the next run after `kill -9`.
//!
//! ```text
//! site s (1, 2, ..): router gw-<labid>-r<s>, bridge lan0 10.77.s.1/24; hosts gw-<labid>-<host>, eth0 10.77.s.(10+n)/24
//! ```

pub mod asker;
pub mod check;
pub mod cleanup;
pub mod frames;
pub mod images;
pub mod node;
pub mod ns;
pub mod prober;
pub mod qemus;
pub mod signals;
pub mod wan;

use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use cleanup::LabLock;
use ns::NetNs;
use wan::{LinkParams, Wan, WanLink, WanMode};

/// Most sites of one lab (a link per pair).
const SITES_MAX: usize = 8;
/// Most hosts of one site.
const HOSTS_MAX: usize = 64;

/// A site and the names of its hosts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SiteConfig {
    /// Its name, as it appears in certificates.
    pub name: String,
    /// Host names: 1 to 16 characters of a-z and 0-9, unique in the lab, not `r` and digits, not `probe` and digits.
    pub hosts: Vec<String>,
}

impl SiteConfig {
    /// A site with these hosts.
    pub fn new(name: &str, hosts: &[&str]) -> Self {
        Self { name: name.to_owned(), hosts: hosts.iter().map(|host| (*host).to_owned()).collect() }
    }
}

/// What to build.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LabConfig {
    /// 1 to 8 characters of a-z and 0-9; one running lab per id and machine.
    pub labid: String,
    /// Its sites; every pair is joined by one link.
    pub sites: Vec<SiteConfig>,
    /// How they are joined.
    pub wan: WanMode,
}

impl LabConfig {
    /// Host `h1` and `h3` in `paris`, `h2` in `tokyo`, 100 Mbit/s and 80 ms round trip between the sites.
    pub fn demo(labid: &str) -> Self {
        Self {
            labid: labid.to_owned(),
            sites: vec![SiteConfig::new("paris", &["h1", "h3"]), SiteConfig::new("tokyo", &["h2"])],
            wan: WanMode::Shaped(LinkParams::new(100, 80)),
        }
    }

    fn check(&self) -> Result<()> {
        cleanup::check_labid(&self.labid)?;
        if self.sites.is_empty() || self.sites.len() > SITES_MAX {
            bail!("a lab has 1 to {SITES_MAX} sites");
        }
        let mut seen = std::collections::BTreeSet::new();
        for site in &self.sites {
            if site.hosts.len() > HOSTS_MAX {
                bail!("site {}: at most {HOSTS_MAX} hosts", site.name);
            }
            for host in &site.hosts {
                let plain = host.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
                let reserved = ["r", "probe"].iter().any(|prefix| {
                    host.strip_prefix(prefix)
                        .is_some_and(|rest| rest.bytes().all(|b| b.is_ascii_digit()))
                });
                if !plain || reserved || !(1..=16).contains(&host.len()) || !seen.insert(host) {
                    bail!(
                        "host name {host:?}: use a unique one of 1 to 16 characters of a-z and 0-9, not r<n> or probe<n>"
                    );
                }
            }
        }
        Ok(())
    }
}

/// One host of the lab. A plain handle: dropping it changes nothing.
#[derive(Clone, Debug)]
pub struct Host {
    /// Its name in the configuration.
    pub name: String,
    /// Its site's name.
    pub site: String,
    /// Its address on the site's LAN; other sites reach it through the routers.
    pub addr: Ipv4Addr,
    /// Its namespace.
    pub ns: NetNs,
    /// For the node's `--state` (exists, 0700).
    pub state_dir: PathBuf,
    /// For logs and anything else (exists, 0700).
    pub work_dir: PathBuf,
}

impl Host {
    /// A command inside the host that dies with this process's spawning thread; see [`NetNs::command`].
    pub fn command(&self, program: &str) -> Command {
        let mut command = self.ns.command(program);
        command.current_dir(&self.work_dir);
        command
    }
}

/// A built lab. Dropping it removes everything.
pub struct Lab {
    labid: String,
    dir: PathBuf,
    hosts: Vec<Host>,
    // Fields drop in this order: the emulator first, the lock last.
    wan: Option<Wan>,
    _watch: signals::Watch,
    _lock: LabLock,
}

impl Lab {
    /// Builds the lab, after removing what an earlier run with the same id left. Needs root. Fails when a living
    /// process uses the id; on any other failure nothing is left.
    pub fn new(config: &LabConfig) -> Result<Self> {
        config.check()?;
        if !nix::unistd::geteuid().is_root() {
            bail!("the lab makes network namespaces: run it as root");
        }
        let labid = config.labid.clone();
        let lock = LabLock::take(&labid)?;
        cleanup::sweep(&labid).context("removing what an earlier run left")?;
        let watch = signals::Watch::labs_end(&labid)?;
        let dir = cleanup::run_dir(&labid);
        // From here on Drop undoes what was made so far.
        let mut lab = Self { labid, dir, hosts: Vec::new(), wan: None, _watch: watch, _lock: lock };
        cleanup::make_private_dir(&lab.dir)?;
        for (index, site) in config.sites.iter().enumerate() {
            lab.build_site(index, site).with_context(|| format!("building site {}", site.name))?;
        }
        lab.wan = Some(lab.build_wan(config).context("building the WAN")?);
        Ok(lab)
    }

    /// Its id.
    pub fn labid(&self) -> &str {
        &self.labid
    }

    /// Its directory, 0700, removed with it.
    pub fn dir(&self) -> &std::path::Path {
        &self.dir
    }

    /// All hosts, site by site in the order of the configuration.
    pub fn hosts(&self) -> &[Host] {
        &self.hosts
    }

    /// A host by name.
    pub fn host(&self, name: &str) -> Result<&Host> {
        self.hosts
            .iter()
            .find(|host| host.name == name)
            .with_context(|| format!("the lab has no host {name}"))
    }

    /// The links between sites.
    pub fn wan(&self) -> Result<&Wan> {
        self.wan.as_ref().context("the lab is torn down")
    }

    /// Network prefix of a site's LAN, such as `10.77.1.0/24`.
    pub fn site_prefix(&self, site: &str) -> Result<String> {
        let host = self.hosts.iter().find(|host| host.site == site);
        let [a, b, c, _] = host.with_context(|| format!("no hosts in site {site}"))?.addr.octets();
        Ok(format!("{a}.{b}.{c}.0/24"))
    }

    /// From now on TCP connections between sites begin with this congestion control, at both ends, unless the program
    /// chooses for itself. (A route attribute: a namespace's sysctl takes only what the machine allows to everyone.)
    pub fn set_congestion_control(&self, name: &str) -> Result<()> {
        for host in &self.hosts {
            let route = default_route(host.addr);
            host.ns
                .batch(&[format!("route replace {route} congctl {name}")])
                .with_context(|| format!("no congestion control {name}: modprobe tcp_{name}"))?;
        }
        Ok(())
    }

    /// A further namespace of this lab, `gw-<labid>-<name>`, removed with it.
    pub fn extra_ns(&self, name: &str) -> Result<NetNs> {
        NetNs::create(&format!("gw-{}-{name}", self.labid))
    }

    /// Kills every process of the lab and removes every trace. Drop does the same but can only print an error.
    pub fn teardown(mut self) -> Result<()> {
        self.end()
    }

    fn end(&mut self) -> Result<()> {
        self.wan = None;
        self.hosts.clear();
        cleanup::sweep(&self.labid).map(drop)
    }

    fn router(&self, site: usize) -> NetNs {
        NetNs::named(&format!("gw-{}-r{}", self.labid, site + 1))
    }

    fn build_site(&mut self, index: usize, site: &SiteConfig) -> Result<()> {
        let net = index + 1;
        let router = NetNs::create(self.router(index).name())?;
        // No IPv6 here: its own chatter would appear in the WAN's counters.
        for key in ["ipv6/conf/all/disable_ipv6", "ipv6/conf/default/disable_ipv6"] {
            router.sysctl(key, "1")?;
        }
        for (key, value) in [
            ("ipv4/ip_forward", "1"),
            ("ipv4/conf/all/rp_filter", "0"),
            ("ipv4/conf/default/rp_filter", "0"),
        ] {
            router.sysctl(key, value)?;
        }
        let mut lines = vec![
            "link add lan0 type bridge forward_delay 0 mcast_snooping 0".to_owned(),
            format!("addr add 10.77.{net}.1/24 dev lan0"),
            "link set lan0 up".to_owned(),
        ];
        for (number, name) in site.hosts.iter().enumerate() {
            let ns = NetNs::create(&format!("gw-{}-{name}", self.labid))?;
            let dir = self.dir.join(name);
            let (state_dir, work_dir) = (dir.join("state"), dir.join("work"));
            cleanup::make_private_dir(&state_dir)?;
            cleanup::make_private_dir(&work_dir)?;
            let addr = Ipv4Addr::new(10, 77, net as u8, 10 + number as u8);
            lines.push(format!("link add p{number} type veth peer name eth0 netns {}", ns.name()));
            lines.push(format!("link set p{number} master lan0 up"));
            self.hosts.push(Host {
                name: name.clone(),
                site: site.name.clone(),
                addr,
                ns,
                state_dir,
                work_dir,
            });
        }
        router.batch(&lines)?;
        for host in self.hosts.iter().filter(|host| host.site == site.name) {
            host.ns.batch(&[
                format!("addr add {}/24 dev eth0", host.addr),
                "link set eth0 up".to_owned(),
                format!("route add {}", default_route(host.addr)),
            ])?;
        }
        Ok(())
    }

    fn build_wan(&self, config: &LabConfig) -> Result<Wan> {
        let mut links = Vec::new();
        for far in 1..config.sites.len() {
            for near in 0..far {
                let (near_router, far_router) = (self.router(near), self.router(far));
                let (near_device, far_device) =
                    (format!("wan{}", far + 1), format!("wan{}", near + 1));
                let near_end = wan::End {
                    site: &config.sites[near].name,
                    router: &near_router,
                    device: &near_device,
                };
                let far_end = wan::End {
                    site: &config.sites[far].name,
                    router: &far_router,
                    device: &far_device,
                };
                links.push(WanLink::join(&near_end, &far_end, &config.wan, links.len() as u64)?);
                for (router, device, site) in
                    [(&near_router, &near_device, far), (&far_router, &far_device, near)]
                {
                    // Addresses of a /32 let a veth answer ARP for its peer; the route names it as on-link gateway.
                    let own = if site == far { near } else { far } + 1;
                    let peer = site + 1;
                    router.batch(&[
                        format!(
                            "addr add 10.78.{own}.{peer}/32 peer 10.78.{peer}.{own} dev {device}"
                        ),
                        format!("route add 10.77.{peer}.0/24 via 10.78.{peer}.{own} dev {device}"),
                    ])?;
                }
            }
        }
        Ok(Wan::new(links))
    }
}

/// By the site's router, which has the first address of the LAN.
fn default_route(addr: Ipv4Addr) -> String {
    let [a, b, c, _] = addr.octets();
    format!("default via {a}.{b}.{c}.1")
}

impl Drop for Lab {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            eprintln!("lab {}: {error:#}; run `godwit-lab cleanup {}`", self.labid, self.labid);
        }
    }
}
