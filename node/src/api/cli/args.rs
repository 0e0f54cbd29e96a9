//! The arguments. Owns their names, forms and help texts, nothing else.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use godwit_protocol::id::Name;

use super::cluster::ClusterCommand;
use super::human;
pub use super::wire_args::WireCommand;

/// `godwit`.
#[derive(Debug, Parser)]
#[command(
    name = "godwit",
    version,
    about = "Moves running virtual machines between hosts that share nothing but a network",
    max_term_width = 100
)]
pub struct Cli {
    /// State directory of the daemon
    #[arg(
        long,
        global = true,
        value_name = "DIR",
        env = "GODWIT_STATE",
        default_value = "/var/lib/godwit"
    )]
    pub state: PathBuf,
    /// Print JSON on standard output, errors too
    #[arg(long, global = true)]
    pub json: bool,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make a swarm, with this host as its first member
    Init(InitOptions),
    /// Print a one-time token that lets a new host join
    Token {
        /// How long it can be redeemed
        #[arg(long, default_value = "1h", value_parser = human::duration)]
        ttl: Duration,
    },
    /// Join a swarm with a token from one of its members
    Join(JoinOptions),
    /// Run the daemon
    Run(RunOptions),
    /// Leave the swarm
    Leave,
    /// List the members
    Hosts,
    /// Take a member's certificate away, for ever, once it votes on nothing any more
    Revoke {
        /// Name or id of the member
        host: String,
        /// At once, whatever runs there and wherever it votes
        #[arg(long)]
        now: bool,
    },
    /// Let this host vote on nothing and take no virtual machines, before it is switched off
    Drain {
        /// It is a host like any other again
        #[arg(long)]
        undo: bool,
    },
    /// Start, list, show and stop virtual machines
    Vm {
        /// What to do.
        #[command(subcommand)]
        command: VmCommand,
    },
    /// Name virtual machines that move together: all or none of them
    Cluster {
        /// What to do.
        #[command(subcommand)]
        command: ClusterCommand,
    },
    /// Move a running virtual machine, or a cluster of them, to other hosts
    Migrate(MigrateOptions),
    /// List migrations, or show one with its timeline
    Migrations {
        /// What to do; nothing: list.
        #[command(subcommand)]
        command: Option<MigrationsCommand>,
    },
    /// Give a migration up, if its guest has not been stopped yet
    Abort {
        /// Id of the migration, or its first digits
        id: String,
    },
    /// Show which host carries which address
    Routes,
    /// Name files whose content need not cross the network again
    Image {
        /// What to do.
        #[command(subcommand)]
        command: ImageCommand,
    },
    /// Show what this node is
    Status,
    /// List the wires that are known (as `wire list`)
    Wires,
    /// Connect things to wires
    Wire {
        /// What to do.
        #[command(subcommand)]
        command: WireCommand,
    },
}

/// `godwit vm`.
#[derive(Debug, Subcommand)]
pub enum VmCommand {
    /// Start a virtual machine
    Run {
        /// Its specification
        #[arg(value_name = "SPEC.toml")]
        spec: PathBuf,
    },
    /// List virtual machines
    List,
    /// Show one
    Show {
        /// Name or id
        vm: String,
    },
    /// Start one that is off, from its disks
    Start {
        /// Name or id
        vm: String,
    },
    /// Power one down and forget it
    Stop {
        /// Name or id
        vm: String,
        /// End it at once
        #[arg(long)]
        kill: bool,
    },
    /// Use the serial console of one (Ctrl-] leaves)
    Console {
        /// Name or id
        vm: String,
    },
}

/// `godwit migrations`.
#[derive(Debug, Subcommand)]
pub enum MigrationsCommand {
    /// Show one with the timeline of both ends
    Show {
        /// Id of the migration, or its first digits
        id: String,
    },
}

/// `godwit image`.
#[derive(Debug, Subcommand)]
pub enum ImageCommand {
    /// Add a file: what it holds is not sent to this host again
    Add {
        /// The file
        path: PathBuf,
    },
    /// List the files
    List,
    /// Forget a file (it stays, unless godwit made and kept it after a move)
    Remove {
        /// The file
        path: PathBuf,
    },
}

/// `godwit init`.
#[derive(Debug, Clone, Args)]
pub struct InitOptions {
    /// From the global option.
    #[arg(skip)]
    pub state: PathBuf,
    /// Where this host is: hosts of one site are near each other
    #[arg(long)]
    pub site: Name,
    /// Name of this host; without it, the system's host name
    #[arg(long)]
    pub name: Option<Name>,
}

/// `godwit join`.
#[derive(Debug, Clone, Args)]
pub struct JoinOptions {
    /// From the global option.
    #[arg(skip)]
    pub state: PathBuf,
    /// What `godwit token` printed on a member
    pub token: String,
    /// Where this host is: hosts of one site are near each other
    #[arg(long)]
    pub site: Name,
    /// Name of this host; without it, the system's host name
    #[arg(long)]
    pub name: Option<Name>,
}

/// `godwit run`.
#[derive(Debug, Clone, Args)]
pub struct RunOptions {
    /// From the global option.
    #[arg(skip)]
    pub state: PathBuf,
    /// Address and port to listen on
    #[arg(long, value_name = "ADDR:PORT")]
    pub listen: Option<SocketAddr>,
    /// Address under which other hosts reach this one, if it is not the one to listen on
    #[arg(long, value_name = "ADDR[:PORT]", value_parser = advertise)]
    pub advertise: Option<SocketAddr>,
    /// Most memory for guests, such as 64G; without it, what the host has
    #[arg(long, value_name = "SIZE", value_parser = human::bytes)]
    pub memory_limit: Option<u64>,
    /// QEMU to start machines with
    #[arg(long, value_name = "PATH", default_value = "qemu-system-x86_64")]
    pub qemu: PathBuf,
    /// How guests run
    #[arg(long, value_enum, default_value = "auto")]
    pub accel: Accel,
    /// Network between hosts of this site that may carry guests' frames unencrypted (repeatable)
    #[arg(long, value_name = "CIDR")]
    pub trusted_lan: Vec<Cidr>,
    /// Directory for disks of VMs that move here; without it, images/ in the state directory
    #[arg(long, value_name = "DIR")]
    pub image_dir: Option<PathBuf>,
    /// How long disks and memory of VMs that moved away are kept as a source for their way back
    #[arg(long, value_name = "HOURS", default_value_t = 24)]
    pub keep_hours: u32,
    /// How much of it is kept, such as 20G; 0: nothing
    #[arg(long, value_name = "SIZE", value_parser = kept_bytes, default_value = "20G")]
    pub keep_bytes: u64,
}

/// `godwit migrate`.
#[derive(Debug, Clone, Args)]
pub struct MigrateOptions {
    /// Name or id of the virtual machine or cluster
    pub vm: String,
    /// Where to: HOST, several hosts (h4,h5), site:SITE or auto
    #[arg(long, required_unless_present = "place")]
    pub to: Option<String>,
    /// Where members of a cluster shall go, such as a=h4,b=h5; without --to only they move
    #[arg(long, value_name = "VM=HOST", value_delimiter = ',', value_parser = placed)]
    pub place: Vec<(String, String)>,
    /// Print where each would go and what would refuse; change nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Show progress until it ends (exit code 0 moved, 3 stayed, 4 lost)
    #[arg(long)]
    pub wait: bool,
    /// Most bytes per second, such as 10M or 80Mbit; without it, what the path gives
    #[arg(long, value_name = "RATE", value_parser = human::rate)]
    pub bandwidth: Option<u64>,
    /// Most bytes per second that are read of each disk to copy it; without it, what the path takes
    #[arg(long, value_name = "RATE", value_parser = human::rate)]
    pub disk_bandwidth: Option<u64>,
    /// Longest planned pause, such as 300ms
    #[arg(long, value_name = "TIME", value_parser = human::duration)]
    pub max_downtime: Option<Duration>,
    /// Give up if the guest was not stopped by then, such as 10m
    #[arg(long, value_name = "TIME", value_parser = human::duration)]
    pub deadline: Option<Duration>,
}

/// How guests run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Accel {
    /// KVM if it works here, else TCG
    Auto,
    /// In hardware
    Kvm,
    /// Emulated
    Tcg,
}

/// A network: address and prefix length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cidr {
    /// Its address; bits after the prefix are zero.
    pub address: IpAddr,
    /// Leading bits.
    pub prefix: u8,
}

impl Cidr {
    /// Whether an address is in this network.
    #[must_use]
    pub fn contains(&self, address: IpAddr) -> bool {
        self.address.is_ipv4() == address.is_ipv4() && masked(address, self.prefix) == self.address
    }
}

impl FromStr for Cidr {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || format!("{text} is no network such as 10.0.0.0/24");
        let (address, prefix) = text.split_once('/').ok_or_else(bad)?;
        let address: IpAddr = address.parse().map_err(|_| bad())?;
        let prefix: u8 = prefix.parse().map_err(|_| bad())?;
        if prefix > if address.is_ipv4() { 32 } else { 128 } {
            return Err(bad());
        }
        let network = masked(address, prefix);
        if network != address {
            return Err(format!("{text} has bits set after its prefix: write {network}/{prefix}"));
        }
        Ok(Self { address, prefix })
    }
}

impl std::fmt::Display for Cidr {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)
    }
}

fn masked(address: IpAddr, prefix: u8) -> IpAddr {
    let prefix = u32::from(prefix);
    match address {
        IpAddr::V4(a) => {
            let mask = u32::MAX.checked_shl(32 - prefix.min(32)).unwrap_or(0);
            IpAddr::V4((a.to_bits() & mask).into())
        }
        IpAddr::V6(a) => {
            let mask = u128::MAX.checked_shl(128 - prefix.min(128)).unwrap_or(0);
            IpAddr::V6((a.to_bits() & mask).into())
        }
    }
}

/// Port 0 stands for the port that is listened on.
fn advertise(text: &str) -> Result<SocketAddr, String> {
    match text.parse::<IpAddr>() {
        Ok(address) => Ok(SocketAddr::new(address, 0)),
        Err(_) => text.parse().map_err(|_| "write an IP address, with or without :PORT".to_owned()),
    }
}

/// `VM=HOST`.
fn placed(text: &str) -> Result<(String, String), String> {
    let parts = text.split_once('=').filter(|(vm, host)| !vm.is_empty() && !host.is_empty());
    let (vm, host) = parts.ok_or_else(|| format!("{text}: write VM=HOST, such as a=h4"))?;
    Ok((vm.to_owned(), host.to_owned()))
}

/// A size; nothing needs no unit.
fn kept_bytes(text: &str) -> Result<u64, String> {
    if text == "0" { Ok(0) } else { human::bytes(text) }
}

impl RunOptions {
    /// What other hosts dial when this one listens on `listen`; none: what it listens on.
    #[must_use]
    pub fn advertised(&self, listen: SocketAddr) -> Option<SocketAddr> {
        let port = |a: SocketAddr| if a.port() == 0 { listen.port() } else { a.port() };
        self.advertise.map(|a| SocketAddr::new(a.ip(), port(a)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn parse(line: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(line.split_whitespace())
    }

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn documented_commands_parse() {
        for line in [
            "godwit init --site paris --name a",
            "godwit token --ttl 1h --json",
            "godwit join TOKEN --site tokyo --name b",
            "godwit run --state /s --listen 0.0.0.0:7000 --advertise 10.0.0.1 --memory-limit 4G \
             --qemu /usr/bin/qemu-system-x86_64 --accel tcg --trusted-lan 10.0.0.0/24 \
             --trusted-lan fd00::/8 --image-dir /i --keep-hours 48 --keep-bytes 100G",
            "godwit run --keep-bytes 0",
            "godwit leave",
            "godwit hosts",
            "godwit revoke b",
            "godwit --state /s vm run web.toml",
            "godwit vm list",
            "godwit vm show web",
            "godwit vm stop web --kill",
            "godwit vm console web",
            "godwit migrate web --to site:tokyo --wait --bandwidth 10M --max-downtime 300ms \
             --deadline 10m --json",
            "godwit migrate web --to h4,h5 --place a=h4,b=h5 --dry-run",
            "godwit migrate web --place a=h4",
            "godwit cluster create web --vms a,b,c",
            "godwit cluster list",
            "godwit cluster show web --json",
            "godwit cluster add web d",
            "godwit cluster remove web d",
            "godwit cluster delete web",
            "godwit cluster force web --i-am-sure --why both-sites-burnt",
            "godwit drain",
            "godwit drain --undo",
            "godwit revoke b --now",
            "godwit migrations",
            "godwit migrations show abcd",
            "godwit abort abcd",
            "godwit routes",
            "godwit wire create lan --encrypt",
            "godwit wire list",
            "godwit wire connect web lan --mac 52:54:00:00:00:01",
            "godwit wire disconnect web lan",
            "godwit wire filter web deny",
            "godwit image add /x",
            "godwit image list",
            "godwit image remove /x",
        ] {
            assert!(parse(line).is_ok(), "{line}: {:?}", parse(line).err());
        }
    }

    #[test]
    fn wrong_forms_say_what_to_write() {
        for (line, says) in [
            ("godwit init --site Paris!", "a name has 1 to 63"),
            ("godwit run --memory-limit lots", "64M"),
            ("godwit run --keep-bytes 20", "64M"),
            ("godwit run --trusted-lan 10.0.0.1/24", "write 10.0.0.0/24"),
            ("godwit migrate web --to b --max-downtime 300", "unit"),
            ("godwit migrate web", "--to"),
            ("godwit migrate web --place a", "VM=HOST"),
            ("godwit cluster force web", "--i-am-sure"),
            ("godwit run --advertise nowhere", "IP address"),
        ] {
            let error = parse(line).err().map(|e| e.to_string()).unwrap_or_default();
            assert!(error.contains(says), "{line}: {error}");
        }
    }

    #[test]
    fn networks_contain_their_addresses_only() {
        let lan: Cidr = "10.1.0.0/16".parse().unwrap();
        assert!(lan.contains([10, 1, 255, 255].into()));
        assert!(!lan.contains([10, 2, 0, 0].into()));
        assert!(!lan.contains("fd00::1".parse().unwrap()));
        let all: Cidr = "0.0.0.0/0".parse().unwrap();
        assert!(all.contains([255, 1, 2, 3].into()));
    }
}
