//! Answers as aligned text. Owns no facts: what the daemon answered is what is shown.

use godwit_protocol::wire::route::Nic;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::human::{show_bytes, show_ms};
use super::progress::phase;
use super::{Answer, cluster};
use crate::api::client::read_answer;
use crate::api::types::{
    ApiError, Done, HostInfo, ImageInfo, Migration, NodeStatus, Request, RouteInfo, Token, VmInfo,
    WireStatus,
};

/// The answer to a plain request.
pub fn answer(request: &Request, value: Value) -> Result<Answer, ApiError> {
    let text = match request {
        Request::VmList {} => rows(&value, &VM_HEAD, vm_row)?,
        Request::VmRun { .. } | Request::VmShow { .. } => vm(&read_answer(value.clone())?),
        Request::Migrations { .. } => rows(&value, &MIGRATION_HEAD, migration_row)?,
        Request::Routes {} => rows(&value, &ROUTE_HEAD, route_row)?,
        Request::Hosts {} => rows(&value, &HOST_HEAD, host_row)?,
        Request::Token { .. } => read_answer::<Token>(value.clone())?.token,
        Request::ImageAdd { .. } => {
            let image: ImageInfo = read_answer(value.clone())?;
            let path = image.path.display();
            format!("{path}: {}, {} chunks", image.state, image.chunks)
        }
        Request::ImageList {} => rows(&value, &IMAGE_HEAD, image_row)?,
        Request::Status {} => status(&read_answer(value.clone())?),
        Request::WireInfo {} => rows(&value, &WIRE_HEAD, wire_row)?,
        Request::Migrate { dry_run: true, .. } => cluster::plan(&read_answer(value.clone())?),
        Request::ClusterList {} => rows(&value, &cluster::HEAD, cluster::row)?,
        Request::ClusterCreate { .. }
        | Request::ClusterShow { .. }
        | Request::ClusterAdd { .. }
        | Request::ClusterRemove { .. }
        | Request::ClusterForce { .. } => cluster::show(&read_answer(value.clone())?),
        _ => return Ok(done(value)),
    };
    Ok(Answer::Show(text, value))
}

/// `{"done": "one line"}` as that line, anything else as JSON.
pub fn done(value: Value) -> Answer {
    let text = match Done::deserialize_from(&value) {
        Some(done) => done.done,
        None => format!("{value:#}"),
    };
    Answer::Show(text, value)
}

impl Done {
    fn deserialize_from(value: &Value) -> Option<Self> {
        serde_json::from_value(value.clone()).ok()
    }
}

/// Left-aligned columns, two blanks apart.
pub fn table(head: &[&str], rows: Vec<Vec<String>>) -> String {
    let mut width: Vec<usize> = head.iter().map(|h| h.chars().count()).collect();
    for row in &rows {
        for (width, cell) in width.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let line = |cells: &mut dyn Iterator<Item = &str>| {
        let mut line = String::new();
        for (cell, width) in cells.zip(&width) {
            line += &format!("{cell:<width$}  ");
        }
        format!("{}\n", line.trim_end())
    };
    let mut text = line(&mut head.iter().copied());
    for row in &rows {
        text += &line(&mut row.iter().map(String::as_str));
    }
    text
}

fn rows<T: DeserializeOwned, const N: usize>(
    value: &Value,
    head: &[&str; N],
    row: impl Fn(&T) -> [String; N],
) -> Result<String, ApiError> {
    let items: Vec<T> = read_answer(value.clone())?;
    Ok(table(head, items.iter().map(|item| row(item).to_vec()).collect()))
}

const VM_HEAD: [&str; 6] = ["NAME", "STATE", "HOST", "MEMORY", "EPOCH", "ID"];

fn vm_row(vm: &VmInfo) -> [String; 6] {
    let memory = some(vm.memory_bytes > 0, || show_bytes(vm.memory_bytes));
    let epoch = vm.epoch.to_string();
    [vm.name.to_string(), vm.state.clone(), vm.host.clone(), memory, epoch, vm.vm.to_string()]
}

fn vm(vm: &VmInfo) -> String {
    let mut lines = vec![
        ("name", vm.name.to_string()),
        ("id", vm.vm.to_string()),
        ("state", vm.state.clone()),
        ("host", vm.host.clone()),
        ("copy", vm.copy.map_or("-".into(), |c| c.to_string())),
        ("epoch", vm.epoch.to_string()),
        ("memory", some(vm.memory_bytes > 0, || show_bytes(vm.memory_bytes))),
        ("accel", some(!vm.accel.is_empty(), || vm.accel.clone())),
        ("machine", some(!vm.machine.is_empty(), || vm.machine.clone())),
        ("pid", vm.pid.map_or("-".into(), |p| p.to_string())),
        ("nics", nics(&vm.nics)),
    ];
    lines.extend(vm.detail.iter().map(|(key, value)| (key.as_str(), plain(value))));
    pairs(&lines)
}

fn status(node: &NodeStatus) -> String {
    let mut lines = vec![
        ("name", node.name.clone()),
        ("id", node.host.to_string()),
        ("site", node.site.clone()),
        ("swarm", node.swarm.to_string()),
        ("store", node.store.to_string()),
        ("version", format!("{} (wire {})", node.version, node.wire_version)),
        ("vms", node.vms.to_string()),
    ];
    lines.extend(node.detail.iter().map(|(key, value)| (key.as_str(), plain(value))));
    pairs(&lines)
}

const MIGRATION_HEAD: [&str; 7] = ["ID", "VM", "FROM", "TO", "PHASE", "TIME", "CAUSE"];

fn migration_row(m: &Migration) -> [String; 7] {
    let s = &m.status;
    let done = s.done_ppm / 10_000;
    let (_, word) = phase(s.phase);
    [
        s.id.to_string(),
        s.name.to_string(),
        m.from_name.clone(),
        m.to_name.clone().unwrap_or("-".into()),
        if s.phase.is_end() { word.into() } else { format!("{word} {done} %") },
        show_ms(s.total_ms),
        s.cause.clone(),
    ]
}

const ROUTE_HEAD: [&str; 5] = ["VM", "HOST", "EPOCH", "VIA", "NICS"];

fn route_row(r: &RouteInfo) -> [String; 5] {
    [r.name.to_string(), r.host.clone(), r.epoch.to_string(), r.via.clone(), nics(&r.nics)]
}

const HOST_HEAD: [&str; 8] = ["NAME", "SITE", "STATE", "VMS", "FREE", "RTT", "ADDRESSES", "ID"];

fn host_row(h: &HostInfo) -> [String; 8] {
    let name = if h.here { format!("{} (here)", h.name) } else { h.name.clone() };
    [
        name,
        h.site.clone(),
        h.state.clone(),
        h.vms.map_or("-".into(), |n| n.to_string()),
        h.memory_free_bytes.map_or("-".into(), show_bytes),
        h.rtt_us.map_or("-".into(), |us| show_ms(us / 1000)),
        some(!h.addresses.is_empty(), || h.addresses.join(" ")),
        h.host.to_string(),
    ]
}

const IMAGE_HEAD: [&str; 7] = ["FILE", "KIND", "SIZE", "ON DISK", "CHUNKS", "STATE", "EXPIRES"];

fn image_row(i: &ImageInfo) -> [String; 7] {
    let now_s = std::time::UNIX_EPOCH.elapsed().map_or(0, |d| d.as_secs());
    [
        i.path.display().to_string(),
        i.kind.clone(),
        show_bytes(i.bytes),
        show_bytes(i.allocated_bytes),
        i.chunks.to_string(),
        i.state.clone(),
        i.expires_s.map_or("-".into(), |at| {
            format!("in {}", show_ms(at.saturating_sub(now_s).saturating_mul(1000)))
        }),
    ]
}

const WIRE_HEAD: [&str; 7] = ["WIRE", "ENCRYPTED", "BRIDGE", "MTU", "GATEWAY", "UPLINK", "ON IT"];

fn wire_row(w: &WireStatus) -> [String; 7] {
    let on: Vec<String> = w.nics.iter().map(|n| format!("{}@{}", n.name, n.host)).collect();
    let encrypted = if w.encrypted { "always" } else { "outside a trusted LAN" };
    let bridge = some(w.here, || w.bridge.clone());
    [
        w.wire.to_string(),
        encrypted.into(),
        bridge,
        w.mtu.to_string(),
        w.gateway.clone().unwrap_or("-".into()),
        w.uplink.as_ref().map_or("-".into(), |u| match &u.down {
            None => u.interface.clone(),
            Some(_) => format!("{} (down)", u.interface),
        }),
        some(!on.is_empty(), || on.join(" ")),
    ]
}

fn nics(nics: &[Nic]) -> String {
    let all: Vec<String> = nics.iter().map(|n| format!("{}@{}", n.mac.colons(), n.wire)).collect();
    some(!all.is_empty(), || all.join(" "))
}

fn some(there: bool, text: impl FnOnce() -> String) -> String {
    if there { text() } else { "-".into() }
}

fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

pub fn pairs(lines: &[(&str, String)]) -> String {
    let width = lines.iter().map(|(key, _)| key.len()).max().unwrap_or(0);
    lines.iter().map(|(key, value)| format!("{key:<width$}  {value}\n")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_align() {
        let text = table(
            &["A", "LONG"],
            vec![vec!["wide cell".into(), "é".into()], vec!["x".into(), "y".into()]],
        );
        assert_eq!(text, "A          LONG\nwide cell  é\nx          y\n");
    }

    #[test]
    fn an_answer_of_another_form_is_an_error_not_a_panic() {
        let value = serde_json::json!({"x": 1});
        assert!(answer(&Request::Hosts {}, value.clone()).is_err());
        assert!(answer(&Request::Leave {}, value).is_ok());
    }
}
