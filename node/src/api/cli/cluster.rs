//! `godwit cluster`: its arguments, its requests, and clusters and plans for people.

use clap::Subcommand;
use godwit_protocol::id::{Name, VmId};

use super::human::show_bytes;
use super::show::{pairs, table};
use crate::api::types::{ApiError, ClusterInfo, Plan, Request};

/// `godwit cluster`.
#[derive(Debug, Subcommand)]
pub enum ClusterCommand {
    /// Make one of virtual machines that run; asked again, what was left half done is finished
    Create {
        /// Its name
        name: Name,
        /// Names or ids of its members, such as a,b,c; the host of the first one leads
        #[arg(long, value_name = "VM", value_delimiter = ',', required = true)]
        vms: Vec<String>,
    },
    /// List clusters
    List,
    /// Show one with its members
    Show {
        /// Name or id
        cluster: String,
    },
    /// Let a virtual machine join one
    Add {
        /// Name or id
        cluster: String,
        /// Name or id
        vm: String,
    },
    /// Let a member go; it runs on by itself
    Remove {
        /// Name or id
        cluster: String,
        /// Name or id
        vm: String,
    },
    /// Delete one; its members run on by themselves
    Delete {
        /// Name or id
        cluster: String,
    },
    /// Let this host alone decide, because most of the hosts that voted are lost for ever
    Force {
        /// Name or id of the cluster, or of a virtual machine that belongs to none
        cluster: String,
        /// Those hosts will never come back: if they did, a virtual machine could run twice
        #[arg(long, required = true)]
        i_am_sure: bool,
        /// Why, for the record
        #[arg(long, default_value = "a majority of the voters is lost")]
        why: String,
    },
}

/// What each asks for.
pub fn request(command: &ClusterCommand) -> Result<Request, ApiError> {
    Ok(match command {
        ClusterCommand::Create { name, vms } => {
            let mut id = [0_u8; 16];
            getrandom::fill(&mut id).map_err(ApiError::plain)?;
            let (cluster, vms) = (name.clone(), vms.clone());
            Request::ClusterCreate { cluster, vms, id: Some(VmId(id)) }
        }
        ClusterCommand::List => Request::ClusterList {},
        ClusterCommand::Show { cluster } => Request::ClusterShow { cluster: cluster.clone() },
        ClusterCommand::Add { cluster, vm } => {
            Request::ClusterAdd { cluster: cluster.clone(), vm: vm.clone() }
        }
        ClusterCommand::Remove { cluster, vm } => {
            Request::ClusterRemove { cluster: cluster.clone(), vm: vm.clone() }
        }
        ClusterCommand::Delete { cluster } => Request::ClusterDelete { cluster: cluster.clone() },
        ClusterCommand::Force { cluster, why, .. } => {
            // For the record, not for admission: whoever reaches the socket is trusted.
            let who = ["SUDO_USER", "USER", "LOGNAME"].iter().find_map(|k| std::env::var(k).ok());
            let by = who.unwrap_or_else(|| format!("uid {}", nix::unistd::getuid()));
            Request::ClusterForce { cluster: cluster.clone(), by, why: why.clone() }
        }
    })
}

/// Columns of `cluster list`.
pub const HEAD: [&str; 6] = ["NAME", "MEMBERS", "HOSTS", "EPOCH", "VOTERS", "ID"];

/// One row of it.
pub fn row(c: &ClusterInfo) -> [String; 6] {
    let mut hosts: Vec<&str> = c.members.iter().map(|m| m.host.as_str()).collect();
    hosts.sort_unstable();
    hosts.dedup();
    [
        c.name.to_string(),
        c.members.len().to_string(),
        or_none(hosts.join(",")),
        c.epoch.to_string(),
        c.voters.join(","),
        c.cluster.to_string(),
    ]
}

/// `cluster show`.
pub fn show(c: &ClusterInfo) -> String {
    let mut text = pairs(&[
        ("name", c.name.to_string()),
        ("id", c.cluster.to_string()),
        ("epoch", c.epoch.to_string()),
        ("last change", c.cause.clone()),
        ("lead", c.lead.clone()),
        ("voters", c.voters.join(",")),
    ]);
    let state = |off: bool| if off { "off" } else { "on" }.to_owned();
    let rows = c.members.iter().map(|m| {
        vec![m.name.to_string(), m.host.clone(), state(m.off), m.vm.to_string(), m.copy.to_string()]
    });
    text += "\n";
    text += &table(&["MEMBER", "HOST", "STATE", "ID", "COPY"], rows.collect());
    text
}

/// `migrate --dry-run`.
pub fn plan(plan: &Plan) -> String {
    let rows = plan.placement.iter().map(|p| {
        let to = p.to.clone().unwrap_or_else(|| "stays".into());
        let refused = if p.refused.is_empty() { "fits".into() } else { p.refused.clone() };
        vec![p.name.to_string(), show_bytes(p.memory_bytes), p.from.clone(), to, refused]
    });
    let text = table(&["VM", "MEMORY", "FROM", "TO", "VERDICT"], rows.collect());
    let verdict = if plan.fits { "nothing refuses" } else { "this would be refused" };
    format!("{text}\n{}: {verdict}; nothing was changed", plan.name)
}

fn or_none(text: String) -> String {
    if text.is_empty() { "-".into() } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::types::Planned;

    #[test]
    fn a_plan_says_who_goes_where_and_what_refuses() {
        let planned = |name: &str, to: Option<&str>, refused: &str| Planned {
            vm: VmId([1; 16]),
            name: name.parse().unwrap(),
            from: "h1".into(),
            to: to.map(Into::into),
            memory_bytes: 512 << 20,
            refused: refused.into(),
        };
        let placement = vec![
            planned("a", Some("h4"), ""),
            planned("b", Some("h5"), "no room"),
            planned("c", None, ""),
        ];
        let text = plan(&Plan { name: "web".parse().unwrap(), placement, fits: false });
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[1], "a   512 MiB  h1    h4     fits");
        assert_eq!(lines[2], "b   512 MiB  h1    h5     no room");
        assert_eq!(lines[3], "c   512 MiB  h1    stays  fits");
        assert!(lines[5].contains("would be refused"));
    }
}
