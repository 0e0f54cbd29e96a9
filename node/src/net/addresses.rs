//! Which ports a node listens on and which addresses it tells the others.
//!
//! Owns the rule of the three ports. Never opens a lasting socket.

use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket};

use super::NetError;
use super::certificate::ADDRESSES;

/// The three listening addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Listen {
    pub control: SocketAddr,
    pub bulk: SocketAddr,
    pub frames: SocketAddr,
}

/// The port and its two successors; with port 0, three ports that were free a moment ago.
pub(super) fn with_port(listen: SocketAddr) -> Result<Listen, NetError> {
    let at = |port| SocketAddr::new(listen.ip(), port);
    if listen.port() != 0 {
        let after = |distance| {
            let cause = "there is no port after it".to_owned();
            let port = listen.port().checked_add(distance);
            port.ok_or(NetError::Listen { address: listen, cause })
        };
        return Ok(Listen { control: listen, bulk: at(after(1)?), frames: at(after(2)?) });
    }
    let failed = |e: std::io::Error| NetError::Listen { address: listen, cause: e.to_string() };
    for _ in 0..64 {
        // All held until the last is chosen, so that they differ.
        let control = TcpListener::bind(at(0)).map_err(failed)?;
        let port = control.local_addr().map_err(failed)?.port();
        let Ok(_quic) = UdpSocket::bind(at(port)) else { continue };
        let bulk = TcpListener::bind(at(0)).map_err(failed)?;
        let frames = UdpSocket::bind(at(0)).map_err(failed)?;
        let bulk = at(bulk.local_addr().map_err(failed)?.port());
        let frames = at(frames.local_addr().map_err(failed)?.port());
        return Ok(Listen { control: at(port), bulk, frames });
    }
    Err(NetError::Listen { address: listen, cause: "no free port".to_owned() })
}

/// What others can dial: the listening address, or the host's addresses if it listens on all.
pub(super) fn reachable(listen: SocketAddr) -> Vec<SocketAddr> {
    if !listen.ip().is_unspecified() {
        return vec![listen];
    }
    let mut found: Vec<IpAddr> = nix::ifaddrs::getifaddrs()
        .map(|all| all.filter_map(|one| address_of(&one)).collect())
        .unwrap_or_default();
    found.retain(|ip| {
        let local = match ip {
            IpAddr::V4(ip) => ip.is_link_local(),
            IpAddr::V6(ip) => link_local(ip),
        };
        (listen.is_ipv6() || ip.is_ipv4()) && !ip.is_loopback() && !local
    });
    found.sort();
    found.dedup();
    found.truncate(ADDRESSES);
    found.into_iter().map(|ip| SocketAddr::new(ip, listen.port())).collect()
}

fn address_of(interface: &nix::ifaddrs::InterfaceAddress) -> Option<IpAddr> {
    let address = interface.address.as_ref()?;
    if let Some(v4) = address.as_sockaddr_in() {
        return Some(IpAddr::V4(v4.ip()));
    }
    address.as_sockaddr_in6().map(|v6| IpAddr::V6(v6.ip()))
}

fn link_local(ip: &Ipv6Addr) -> bool {
    ip.segments()[0] & 0xffc0 == 0xfe80
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_ports() {
        let row = with_port("127.0.0.1:7000".parse().unwrap()).unwrap();
        assert_eq!((row.bulk.port(), row.frames.port()), (7001, 7002));
        assert!(with_port("127.0.0.1:65534".parse().unwrap()).is_err());
        let free = with_port("127.0.0.1:0".parse().unwrap()).unwrap();
        assert!(free.control.port() != 0 && free.control.port() != free.bulk.port());
        assert_eq!(reachable(row.control), vec![row.control]);
        assert!(reachable("0.0.0.0:1".parse().unwrap()).iter().all(|a| !a.ip().is_loopback()));
    }
}
