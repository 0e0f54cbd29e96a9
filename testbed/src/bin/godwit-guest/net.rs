//! The guest's network interface: address, MTU, up.
//!
//! Owns nothing: it configures an interface once by ioctl, because a minimal guest has no `ip` command.

use std::io;
use std::mem;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

/// How long an interface may take to appear.
const APPEAR_DEADLINE: Duration = Duration::from_secs(10);

/// What the kernel command line asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Address {
    /// The interface's address.
    pub ip: Ipv4Addr,
    /// Prefix length, 0..=32.
    pub prefix: u8,
    /// MTU in bytes; `None` keeps what the device offers.
    pub mtu: Option<u16>,
}

impl Address {
    /// Reads `godwit.ip=10.9.0.5/24` and `godwit.mtu=1400`; `Ok(None)` without an address.
    pub fn from_cmdline(cmdline: &str) -> Result<Option<Self>, String> {
        let value = |key: &str| cmdline.split_whitespace().find_map(|w| w.strip_prefix(key));
        let Some(text) = value("godwit.ip=") else {
            return Ok(None);
        };
        let bad = || format!("godwit.ip={text} is not ADDRESS/PREFIX");
        let (ip, prefix) = text.split_once('/').ok_or_else(bad)?;
        let prefix: u8 = prefix.parse().map_err(|_| bad())?;
        if prefix > 32 {
            return Err(bad());
        }
        let mtu = value("godwit.mtu=")
            .map(|mtu| mtu.parse().map_err(|_| format!("godwit.mtu={mtu} is not a number")))
            .transpose()?;
        Ok(Some(Address { ip: ip.parse().map_err(|_| bad())?, prefix, mtu }))
    }
}

/// Gives `interface` its address and brings it up, waiting for the device to appear.
pub fn configure(interface: &str, address: Address) -> io::Result<()> {
    let deadline = Instant::now() + APPEAR_DEADLINE;
    while !Path::new("/sys/class/net").join(interface).exists() {
        if Instant::now() > deadline {
            return Err(io::Error::new(io::ErrorKind::NotFound, "no such interface"));
        }
        thread::sleep(Duration::from_millis(20));
    }
    let socket = control_socket()?;
    if let Some(mtu) = address.mtu {
        let mut request = named(interface);
        request.ifr_ifru.ifru_mtu = i32::from(mtu);
        ioctl(&socket, libc::SIOCSIFMTU, &mut request)?;
    }
    let mask = u32::MAX.checked_shl(32 - u32::from(address.prefix)).unwrap_or(0);
    let mut request = named(interface);
    request.ifr_ifru.ifru_addr = socket_address(address.ip);
    ioctl(&socket, libc::SIOCSIFADDR, &mut request)?;
    request.ifr_ifru.ifru_netmask = socket_address(Ipv4Addr::from(mask));
    ioctl(&socket, libc::SIOCSIFNETMASK, &mut request)?;
    up(&socket, interface)
}

/// Brings the loopback interface up.
pub fn loopback_up() -> io::Result<()> {
    up(&control_socket()?, "lo")
}

/// Datagrams that sockets of this guest had no room for, in either direction.
pub fn udp_dropped() -> u64 {
    std::fs::read_to_string("/proc/net/snmp").map_or(0, |text| dropped(&text))
}

/// Two lines for UDP: names, and figures in the same order.
fn dropped(snmp: &str) -> u64 {
    let mut lines = snmp.lines().filter(|line| line.starts_with("Udp:"));
    let (Some(names), Some(figures)) = (lines.next(), lines.next()) else { return 0 };
    let both = names.split_whitespace().zip(figures.split_whitespace());
    both.filter(|(name, _)| matches!(*name, "RcvbufErrors" | "SndbufErrors"))
        .filter_map(|(_, figure)| figure.parse::<u64>().ok())
        .sum()
}

fn up(socket: &OwnedFd, interface: &str) -> io::Result<()> {
    let mut request = named(interface);
    ioctl(socket, libc::SIOCGIFFLAGS, &mut request)?;
    // SAFETY: SIOCGIFFLAGS has just filled this member of the union.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    request.ifr_ifru.ifru_flags = flags | libc::IFF_UP as libc::c_short;
    ioctl(socket, libc::SIOCSIFFLAGS, &mut request)
}

fn control_socket() -> io::Result<OwnedFd> {
    // SAFETY: socket() takes no pointers; the result is checked, and then owned by nobody else.
    unsafe {
        let fd = libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(OwnedFd::from_raw_fd(fd))
    }
}

fn named(interface: &str) -> libc::ifreq {
    // SAFETY: ifreq is plain data for which all zeroes is valid.
    let mut request: libc::ifreq = unsafe { mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().take(libc::IFNAMSIZ - 1).zip(interface.bytes()) {
        *to = from as libc::c_char;
    }
    request
}

fn socket_address(ip: Ipv4Addr) -> libc::sockaddr {
    let mut data = [0 as libc::c_char; 14];
    for (to, from) in data[2..6].iter_mut().zip(ip.octets()) {
        *to = from as libc::c_char;
    }
    libc::sockaddr { sa_family: libc::AF_INET as libc::sa_family_t, sa_data: data }
}

fn ioctl(socket: &OwnedFd, number: libc::c_ulong, request: &mut libc::ifreq) -> io::Result<()> {
    // SAFETY: all requests used here read or write one ifreq, which is valid for the call.
    match unsafe { libc::ioctl(socket.as_raw_fd(), number as _, request) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drops_are_read_by_their_names() {
        let text =
            "Tcp: A B\nTcp: 7 8\nUdp: InDatagrams RcvbufErrors SndbufErrors X\nUdp: 9 3 2 5\n";
        assert_eq!((dropped(text), dropped("")), (5, 0));
    }

    #[test]
    fn addresses_come_from_the_command_line() {
        let read = Address::from_cmdline("console=ttyS0 godwit.ip=10.9.0.5/24 godwit.mtu=1400");
        let expected = Address { ip: Ipv4Addr::new(10, 9, 0, 5), prefix: 24, mtu: Some(1400) };
        assert_eq!(read, Ok(Some(expected)));
        assert_eq!(Address::from_cmdline("quiet"), Ok(None));
        assert!(Address::from_cmdline("godwit.ip=10.9.0.5").is_err());
        assert!(Address::from_cmdline("godwit.ip=10.9.0.5/33").is_err());
        assert!(Address::from_cmdline("godwit.ip=1.2.3.4/8 godwit.mtu=x").is_err());
    }
}
