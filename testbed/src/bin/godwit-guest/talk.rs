//! One conversation with another guest's echo: the prober of the lab, run in here.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use godwit_testbed::guest::wire::UDP_ECHO_PORT;
use godwit_testbed::lab::prober::{ProbeConfig, ProbeReport, Prober};

/// Bytes of a datagram.
const SIZE: usize = 64;
/// How long nothing has to come back for the rest to count as lost.
const DRAIN: Duration = Duration::from_secs(10);

/// There is one at a time.
#[derive(Default)]
pub struct Talk(Mutex<Option<Prober>>);

impl Talk {
    pub fn start(&self, to: Ipv4Addr, rate_pps: u32) -> Result<(), String> {
        let mut talk = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if talk.is_some() {
            return Err("it talks already".to_owned());
        }
        let target = SocketAddr::from((to, UDP_ECHO_PORT));
        let config = ProbeConfig { target, rate_pps, size: SIZE };
        *talk = Some(Prober::start(None, &config).map_err(|e| format!("{e:#}"))?);
        Ok(())
    }

    pub fn end(&self) -> Result<ProbeReport, String> {
        let talk = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        Ok(talk.ok_or("it does not talk")?.stop(DRAIN))
    }
}
