//! The arguments of `godwit wire`, and what is asked with them. Owns their names, forms and help texts.

use clap::Subcommand;
use godwit_protocol::id::Name;

use crate::api::types::Request;

/// `godwit wire`.
#[derive(Debug, Clone, Subcommand)]
pub enum WireCommand {
    /// Tell every host of a wire, whose frames are not encrypted on a trusted LAN then; one that is only used needs no telling
    Create {
        /// Name of the wire
        wire: Name,
        /// Its frames always travel encrypted between hosts, also on a trusted LAN
        #[arg(long)]
        encrypt: bool,
    },
    /// List the wires that are known, and who is on them
    List,
    /// Put a NIC of a running VM of this host onto a wire, or join the wire to the outside (--uplink)
    #[command(allow_missing_positional = true)]
    Connect {
        /// Name or id of the VM
        #[arg(required_unless_present = "uplink", conflicts_with = "uplink")]
        vm: Option<String>,
        /// Name of the wire
        wire: Name,
        /// The NIC's address, if the VM has more than one that is free
        #[arg(long, conflicts_with = "uplink")]
        mac: Option<String>,
        /// Join the wire to the outside by this interface of this host, instead
        #[arg(long, value_name = "IF")]
        uplink: Option<String>,
        /// The gateway that guests have, the same on every host: an address and its subnet, such as 10.5.0.1/24
        #[arg(long, requires = "uplink")]
        gateway: Option<String>,
        /// Name another gateway than hosts have that are not reached, and gone for good
        #[arg(long, requires = "gateway")]
        replace: bool,
    },
    /// Take a NIC of a running VM of this host off a wire, or the wire's uplink away (--uplink)
    #[command(allow_missing_positional = true)]
    Disconnect {
        /// Name or id of the VM
        #[arg(required_unless_present = "uplink", conflicts_with = "uplink")]
        vm: Option<String>,
        /// Name of the wire
        wire: Name,
        /// The NIC's address, if the VM has more than one there
        #[arg(long, conflicts_with = "uplink")]
        mac: Option<String>,
        /// Take away the uplink that the wire has on this host, instead
        #[arg(long)]
        uplink: bool,
    },
    /// Replace what may reach a NIC of a running VM of this host
    Filter {
        /// Name or id of the VM
        vm: String,
        /// The NIC's address, if the VM has more than one
        #[arg(long)]
        mac: Option<String>,
        /// Rules such as "allow tcp 22 from 10.0.0.0/8"; the first that fits decides; none: everything may
        #[arg(value_name = "RULE")]
        rules: Vec<String>,
    },
    /// Tell the other hosts that an address which is no VM's is on a wire of this host
    Port {
        /// Name of the wire
        wire: Name,
        /// The Ethernet address behind the port
        #[arg(long)]
        mac: String,
        /// Forget the port instead
        #[arg(long)]
        remove: bool,
    },
}

impl WireCommand {
    /// What the daemon is asked.
    pub fn request(&self) -> Request {
        match self.clone() {
            Self::Create { wire, encrypt } => Request::WireCreate { wire, encrypt },
            Self::List => Request::WireInfo {},
            Self::Connect { wire, uplink, gateway, replace, vm: None, .. } => {
                Request::WireUplink { wire, interface: uplink, gateway, replace }
            }
            Self::Disconnect { wire, vm: None, .. } => {
                Request::WireUplink { wire, interface: None, gateway: None, replace: false }
            }
            Self::Connect { vm: Some(vm), wire, mac, .. } => {
                Request::WireConnect { vm, wire, mac, disconnect: false }
            }
            Self::Disconnect { vm: Some(vm), wire, mac, .. } => {
                Request::WireConnect { vm, wire, mac, disconnect: true }
            }
            Self::Filter { vm, mac, rules } => Request::WireFilter { vm, mac, rules },
            Self::Port { wire, mac, remove } => Request::WirePort { wire, mac, remove },
        }
    }
}
