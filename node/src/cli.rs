//! The binary's wiring: the command line, with the adapters that it cannot name itself.

use std::process::ExitCode;
use std::time::Duration;

use godwit_protocol::id::{Name, SwarmId};
use serde_json::{Value, json};

use crate::api::ApiError;
use crate::api::cli::args::Accel;
use crate::api::cli::{InitOptions, JoinOptions, Local, RunOptions};
use crate::driver;
use crate::net::{self, AdmissionError};
use crate::vmm::AccelChoice;

struct Wiring;

impl Local for Wiring {
    async fn init(&self, options: InitOptions) -> Result<Value, ApiError> {
        let name = name_or_hosts(options.name)?;
        let swarm = net::init(&options.state, options.site.clone(), name.clone());
        let done = "made the swarm, with this host as its first member";
        member(done, &name, &options.site, swarm)
    }

    async fn join(&self, options: JoinOptions) -> Result<Value, ApiError> {
        let name = name_or_hosts(options.name)?;
        let site = options.site.clone();
        let swarm = net::join(&options.token, &options.state, site, name.clone()).await;
        member("joined the swarm", &name, &options.site, swarm)
    }

    async fn run(&self, o: RunOptions) -> Result<Value, ApiError> {
        let listen = o.listen.unwrap_or_else(driver::default_listen);
        let trusted_lan = o.trusted_lan.iter().map(|lan| lan.to_string().parse());
        let options = driver::RunOptions {
            advertise: o.advertise,
            listen,
            memory_limit: o.memory_limit,
            qemu: o.qemu,
            accel: match o.accel {
                Accel::Auto => AccelChoice::Auto,
                Accel::Kvm => AccelChoice::Kvm,
                Accel::Tcg => AccelChoice::Tcg,
            },
            image_dir: o.image_dir.unwrap_or_else(|| o.state.join("images")),
            keep: Duration::from_secs(u64::from(o.keep_hours) * 3600),
            keep_bytes: o.keep_bytes,
            trusted_lan: trusted_lan.collect::<Result<_, _>>().map_err(ApiError::plain)?,
            state: o.state,
        };
        driver::run(options).await.map_err(ApiError::plain)?;
        Ok(Value::Null)
    }
}

fn member(
    done: &str,
    name: &Name,
    site: &Name,
    swarm: Result<SwarmId, AdmissionError>,
) -> Result<Value, ApiError> {
    let swarm = swarm.map_err(ApiError::plain)?;
    let done = format!("{name} ({site}) {done} ({swarm}); now run the daemon: godwit run");
    Ok(json!({"done": done, "swarm": swarm, "name": name, "site": site}))
}

/// The given name, or the first label of the system's host name if that is a name.
fn name_or_hosts(name: Option<Name>) -> Result<Name, ApiError> {
    if let Some(name) = name {
        return Ok(name);
    }
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let label = host.trim().split('.').next().unwrap_or_default().to_ascii_lowercase();
    label.parse().map_err(|_| {
        ApiError::new(
            format!("the system's host name ({label:?}) is no name here"),
            "add --name NAME",
        )
    })
}

/// What `main` does.
#[must_use]
pub fn main() -> ExitCode {
    crate::api::cli::main(&Wiring)
}
