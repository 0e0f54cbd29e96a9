//! The WAN between sites: one link per pair of sites, emulated in user space or, unshaped, a plain veth pair.
//!
//! Owns the devices between the sites' routers and the emulator's threads. Never touches the sites' LANs. Invariant:
//! a packet between two sites passes exactly one link and is counted there once.
//!
//! ```text
//! hosts of paris -- bridge -- router paris [tun] == Direction, Direction == [tun] router tokyo -- bridge -- hosts of tokyo
//! ```

mod pump;
mod shaper;
mod tun;

use std::sync::Arc;
use std::thread::JoinHandle;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

pub use pump::DirectionStats;
pub use shaper::{LinkParams, Shaper, Verdict};
pub use tun::MTU;

use super::ns::NetNs;
use pump::Direction;
use tun::Tun;

/// How sites are joined.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WanMode {
    /// Every pair of sites by a link of these parameters.
    Shaped(LinkParams),
    /// Every pair of sites by a plain veth pair, offloads on: as fast as the kernel goes.
    Unshaped,
}

/// Both directions of a link or of the whole WAN.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinkStats {
    /// From the site named first.
    pub forward: DirectionStats,
    /// Towards the site named first.
    pub backward: DirectionStats,
}

impl LinkStats {
    /// Bytes of IP packets that used the link, both directions.
    pub fn carried_bytes(&self) -> u64 {
        self.forward.carried_bytes + self.backward.carried_bytes
    }

    /// What happened since `earlier`.
    pub fn since(&self, earlier: &Self) -> Self {
        Self {
            forward: self.forward.since(&earlier.forward),
            backward: self.backward.since(&earlier.backward),
        }
    }
}

impl DirectionStats {
    fn zip(&self, other: &Self, f: impl Fn(u64, u64) -> u64) -> Self {
        Self {
            offered_packets: f(self.offered_packets, other.offered_packets),
            offered_bytes: f(self.offered_bytes, other.offered_bytes),
            carried_packets: f(self.carried_packets, other.carried_packets),
            carried_bytes: f(self.carried_bytes, other.carried_bytes),
            delivered_packets: f(self.delivered_packets, other.delivered_packets),
            delivered_bytes: f(self.delivered_bytes, other.delivered_bytes),
            queue_dropped: f(self.queue_dropped, other.queue_dropped),
            udp_queue_dropped: f(self.udp_queue_dropped, other.udp_queue_dropped),
            lost: f(self.lost, other.lost),
            cut_dropped: f(self.cut_dropped, other.cut_dropped),
            write_failed: f(self.write_failed, other.write_failed),
            cpu_us: f(self.cpu_us, other.cpu_us),
        }
    }

    /// What happened since `earlier`.
    pub fn since(&self, earlier: &Self) -> Self {
        self.zip(earlier, u64::saturating_sub)
    }

    /// Both together.
    pub fn plus(&self, other: &Self) -> Self {
        self.zip(other, |a, b| a + b)
    }
}

enum Medium {
    Shaped {
        forward: Arc<Direction>,
        backward: Arc<Direction>,
        threads: Vec<JoinHandle<()>>,
    },
    /// Namespace and device of the near end, then of the far end.
    Veth {
        ends: [(NetNs, String); 2],
    },
}

/// The link between two sites.
pub struct WanLink {
    /// The two sites' names, in the order of the lab's configuration.
    pub sites: (String, String),
    medium: Medium,
}

/// One end of a link: the router's namespace, the site's name and the device's name there.
pub(super) struct End<'a> {
    pub site: &'a str,
    pub router: &'a NetNs,
    pub device: &'a str,
}

impl WanLink {
    /// Joins two routers. `lane` tells the links' random draws apart. Routes are the caller's.
    pub(super) fn join(near: &End<'_>, far: &End<'_>, mode: &WanMode, lane: u64) -> Result<Self> {
        let medium = match mode {
            WanMode::Shaped(params) => shaped(near, far, params, lane)?,
            WanMode::Unshaped => {
                near.router.batch(&[
                    format!(
                        "link add {} type veth peer name {} netns {}",
                        near.device,
                        far.device,
                        far.router.name()
                    ),
                    format!("link set {} mtu {MTU} up", near.device),
                ])?;
                far.router.batch(&[format!("link set {} mtu {MTU} up", far.device)])?;
                let end = |end: &End<'_>| (end.router.clone(), end.device.to_owned());
                Medium::Veth { ends: [end(near), end(far)] }
            }
        };
        Ok(Self { sites: (near.site.to_owned(), far.site.to_owned()), medium })
    }

    /// From this moment nothing passes; what is in flight is dropped. (On an unshaped link
    /// the receiving router discards, so packets sent into a cut still count.)
    pub fn cut(&self) -> Result<()> {
        match &self.medium {
            Medium::Shaped { forward, backward, .. } => {
                forward.cut();
                backward.cut();
                Ok(())
            }
            Medium::Veth { ends } => forwarding(ends, "0"),
        }
    }

    /// Ends a cut.
    pub fn restore(&self) -> Result<()> {
        match &self.medium {
            Medium::Shaped { forward, backward, .. } => {
                forward.restore();
                backward.restore();
                Ok(())
            }
            Medium::Veth { ends } => forwarding(ends, "1"),
        }
    }

    /// Changes both directions' parameters at run time; no effect on an unshaped link.
    pub fn set(&self, change: impl Fn(&mut LinkParams)) {
        if let Medium::Shaped { forward, backward, .. } = &self.medium {
            forward.set(&change);
            backward.set(&change);
        }
    }

    /// Changes one direction only, `towards` this site; no effect on an unshaped link.
    pub fn set_towards(&self, towards: &str, change: impl Fn(&mut LinkParams)) {
        if let Medium::Shaped { forward, backward, .. } = &self.medium {
            if towards == self.sites.1 { forward.set(change) } else { backward.set(change) }
        }
    }

    /// Present parameters of the forward direction; none when unshaped.
    pub fn params(&self) -> Option<LinkParams> {
        match &self.medium {
            Medium::Shaped { forward, .. } => Some(forward.params()),
            Medium::Veth { .. } => None,
        }
    }

    /// Counters. Unshaped: the device's own, less 14 bytes of Ethernet header a frame; a frame there can be a
    /// segment of up to 64 KiB that the kernel never split, so headers count once for it.
    pub fn stats(&self) -> Result<LinkStats> {
        match &self.medium {
            Medium::Shaped { forward, backward, .. } => {
                Ok(LinkStats { forward: forward.stats(), backward: backward.stats() })
            }
            Medium::Veth { ends: [(near, device), _] } => veth_stats(near, device),
        }
    }
}

impl Drop for WanLink {
    fn drop(&mut self) {
        if let Medium::Shaped { forward, backward, threads } = &mut self.medium {
            forward.stop();
            backward.stop();
            for thread in threads.drain(..) {
                let _ = thread.join();
            }
        }
    }
}

fn shaped(near: &End<'_>, far: &End<'_>, params: &LinkParams, lane: u64) -> Result<Medium> {
    let near_tun = Arc::new(Tun::create(near.router, near.device)?);
    let far_tun = Arc::new(Tun::create(far.router, far.device)?);
    let forward = Direction::new(near_tun.clone(), far_tun.clone(), params.clone(), 2 * lane);
    let backward = Direction::new(far_tun, near_tun, params.clone(), 2 * lane + 1);
    let (forward, backward) = (Arc::new(forward), Arc::new(backward));
    let mut threads = Vec::new();
    for direction in [forward.clone(), backward.clone()] {
        let name = format!("wan-{}", near.device);
        threads.push(std::thread::Builder::new().name(name).spawn(move || direction.run())?);
    }
    Ok(Medium::Shaped { forward, backward, threads })
}

/// Lets the routers take packets from the link, or not. Devices and routes stay as they are.
fn forwarding(ends: &[(NetNs, String); 2], on: &str) -> Result<()> {
    ends.iter()
        .try_for_each(|(ns, device)| ns.sysctl(&format!("ipv4/conf/{device}/forwarding"), on))
}

/// Reads `/proc/net/dev` inside the namespace.
fn veth_stats(ns: &NetNs, device: &str) -> Result<LinkStats> {
    let text = ns.run(|| std::fs::read_to_string("/proc/thread-self/net/dev"))??;
    let line = text
        .lines()
        .find_map(|line| line.trim().strip_prefix(device)?.strip_prefix(':'))
        .with_context(|| format!("no device {device} in {}", ns.name()))?;
    let field: Vec<u64> = line.split_whitespace().filter_map(|word| word.parse().ok()).collect();
    let direction = |bytes: usize, packets: usize| {
        let packets = field.get(packets).copied().unwrap_or(0);
        let bytes = field.get(bytes).copied().unwrap_or(0).saturating_sub(14 * packets);
        DirectionStats {
            offered_packets: packets,
            offered_bytes: bytes,
            carried_packets: packets,
            carried_bytes: bytes,
            delivered_packets: packets,
            delivered_bytes: bytes,
            ..DirectionStats::default()
        }
    };
    Ok(LinkStats { forward: direction(8, 9), backward: direction(0, 1) })
}

/// All links of a lab.
pub struct Wan {
    links: Vec<WanLink>,
}

impl Wan {
    pub(super) fn new(links: Vec<WanLink>) -> Self {
        Self { links }
    }

    /// Every link, in the order of the pairs of sites.
    pub fn links(&self) -> &[WanLink] {
        &self.links
    }

    /// The link between two sites, named in either order.
    pub fn link(&self, a: &str, b: &str) -> Result<&WanLink> {
        let is = |link: &&WanLink| {
            link.sites.0 == a && link.sites.1 == b || link.sites.0 == b && link.sites.1 == a
        };
        self.links.iter().find(is).with_context(|| format!("no link between {a} and {b}"))
    }

    /// Cuts every link.
    pub fn cut(&self) -> Result<()> {
        self.links.iter().try_for_each(WanLink::cut)
    }

    /// Restores every link.
    pub fn restore(&self) -> Result<()> {
        self.links.iter().try_for_each(WanLink::restore)
    }

    /// Changes every link, both directions.
    pub fn set(&self, change: impl Fn(&mut LinkParams)) {
        self.links.iter().for_each(|link| link.set(&change));
    }

    /// Sets the rate of every link in bits of IP packets per second, each direction.
    pub fn set_rate(&self, rate_bps: u64) {
        self.set(|params| params.rate_bps = rate_bps);
    }

    /// Sets the one-way delay of every link in microseconds.
    pub fn set_delay(&self, delay_us: u64) {
        self.set(|params| params.delay_us = delay_us);
    }

    /// Sets the jitter of every link in microseconds.
    pub fn set_jitter(&self, jitter_us: u64) {
        self.set(|params| params.jitter_us = jitter_us);
    }

    /// Sets the loss probability of every link, 0.0 to 1.0.
    pub fn set_loss(&self, loss: f64) {
        self.set(|params| params.loss = loss);
    }

    /// Sum over all links.
    pub fn stats(&self) -> Result<LinkStats> {
        let mut sum = LinkStats::default();
        for link in &self.links {
            let stats = link.stats()?;
            sum.forward = sum.forward.plus(&stats.forward);
            sum.backward = sum.backward.plus(&stats.backward);
        }
        Ok(sum)
    }
}
