//! The language between the harness and the agent inside a guest: one JSON object per line, each way.
//!
//! Owns the request and reply types that `godwit-guest` and [`super::GuestControl`] share; the bare guest speaks the same
//! language. Never does I/O. Invariant: a reply carries the id of its request, so an answer to an earlier, abandoned
//! request is never taken for the answer to this one.

use std::net::Ipv4Addr;

use serde::{Deserialize, Serialize};

use crate::lab::prober::ProbeReport;

/// Longest line in bytes that either side accepts.
pub const MAX_LINE: usize = 4096;
/// Most bytes of a command's output in a reply.
pub const MAX_OUTPUT: usize = 1024;
/// The UDP port that echoes every datagram.
pub const UDP_ECHO_PORT: u16 = 7007;
/// The UDP port that counts numbered datagrams and answers nothing.
pub const UDP_SINK_PORT: u16 = 7010;
/// The TCP port that echoes every byte.
pub const TCP_ECHO_PORT: u16 = 7008;
/// The TCP port that accepts the same requests as the second serial port.
pub const CONTROL_PORT: u16 = 7009;
/// The line that the guest writes to its console once it can be commanded.
pub const READY: &str = "godwit-guest ready";

/// A request with the id that its reply carries.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Envelope {
    /// Chosen by the harness.
    #[serde(default)]
    pub id: u32,
    /// What is asked.
    #[serde(flatten)]
    pub request: Request,
}

/// What the harness can ask of a guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "cmd", rename_all = "lowercase")]
pub enum Request {
    /// Nothing: is it there?
    Ping,
    /// Fill a region and then keep rewriting pages of it. With the size of the newest region only the rate changes.
    Churn {
        /// Size of the region in MiB.
        mb: u32,
        /// Pages are rewritten at this many thousands of bytes (1000) per second; 0 only fills the region.
        rate_kbps: u32,
        /// Rewrite only the first quarter of the region.
        #[serde(default)]
        hot_quarter: bool,
    },
    /// Stop rewriting; the regions stay.
    Stop,
    /// Check every page ever written against its expected version.
    Verify,
    /// Fill the first part of a file or a device and then keep rewriting pages of it, flushed once a second.
    Disk {
        /// The file, which is made, or the device.
        path: String,
        /// How much of it, in MiB; the first request for a path decides.
        mb: u32,
        /// Pages are rewritten at this many thousands of bytes per second; 0 only fills it, or stops.
        rate_kbps: u32,
    },
    /// Flush, and check every page of [`Request::Disk`] as the disk has it.
    VerifyDisks,
    /// Run a line of shell to its end.
    Shell {
        /// The line.
        line: String,
    },
    /// Send numbered datagrams to another guest's echo until [`Request::Hush`].
    Talk {
        /// The other guest.
        to: Ipv4Addr,
        /// Datagrams per second.
        rate_pps: u32,
    },
    /// End that, wait for what is under way, and tell what was seen.
    Hush,
    /// Counters.
    Stats {
        /// Start the longest gaps again from zero after reporting them.
        #[serde(default)]
        reset: bool,
    },
}

/// The first page that did not hold what it should.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Corrupt {
    /// Page index within the guest's workload (over all regions).
    pub index: u32,
    /// The version that was last written.
    pub expected_version: u32,
    /// `zero`, `stale`, `torn` or `garbage`.
    pub fault: String,
    /// The version found in a stale or torn page.
    #[serde(default)]
    pub found_version: Option<u32>,
}

/// Outcome of [`Request::Verify`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verified {
    /// Pages compared.
    pub pages_verified: u64,
    /// Pages that differ from their expected version.
    pub pages_corrupt: u64,
    /// Sum of all pages' versions as the table has them.
    pub versions_total: u64,
    /// Page writes as counted one by one; differs from `versions_total` if the table itself was damaged.
    pub pages_written: u64,
    /// The first corrupt page.
    #[serde(default)]
    pub first_corrupt: Option<Corrupt>,
}

/// Outcome of [`Request::Stats`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats {
    /// Milliseconds since the guest started.
    pub uptime_ms: u64,
    /// Seed of the page formula.
    pub seed: u64,
    /// Pages under the workload's control.
    pub pages: u64,
    /// Page writes so far.
    pub pages_written: u64,
    /// Whether the workload is rewriting pages now.
    pub churning: bool,
    /// Ticks of a 10 ms ticker so far.
    pub ticks: u64,
    /// Longest time between two ticks by the guest's monotonic clock, in milliseconds.
    pub max_gap_monotonic_ms: u64,
    /// Longest time between two ticks by the guest's wall clock, in milliseconds.
    pub max_gap_wall_ms: u64,
    /// Datagrams that the guest's own sockets had no room for, of those that reached it.
    #[serde(default)]
    pub udp_dropped: u64,
    /// What came to the counting port: different numbers.
    #[serde(default)]
    pub sink_unique: u64,
    /// Of these, numbers that came after a higher one.
    #[serde(default)]
    pub sink_reordered: u64,
    /// Numbers that had come before.
    #[serde(default)]
    pub sink_duplicated: u64,
}

/// One answer line.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Reply {
    /// Id of the request; 0 if the line could not be read.
    pub id: u32,
    /// Whether the request was done.
    pub ok: bool,
    /// Why not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// For [`Request::Verify`] and [`Request::VerifyDisks`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verified: Option<Verified>,
    /// For [`Request::Stats`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stats: Option<Stats>,
    /// For [`Request::Hush`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub talked: Option<ProbeReport>,
    /// For [`Request::Shell`]: the end of what it wrote, at most [`MAX_OUTPUT`] bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub output: Option<String>,
}

impl Reply {
    /// A bare yes.
    pub fn ok(id: u32) -> Self {
        Reply { id, ok: true, error: None, verified: None, stats: None, talked: None, output: None }
    }

    /// A refusal with its cause.
    pub fn refuse(id: u32, error: impl Into<String>) -> Self {
        Reply { ok: false, error: Some(error.into()), ..Reply::ok(id) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_read_as_written_by_hand() {
        let line = r#"{"cmd":"churn","mb":16,"rate_kbps":1000,"hot_quarter":false}"#;
        let envelope: Envelope = serde_json::from_str(line).unwrap();
        assert_eq!(
            envelope.request,
            Request::Churn { mb: 16, rate_kbps: 1000, hot_quarter: false }
        );
        let stats: Envelope = serde_json::from_str(r#"{"cmd":"stats","id":7}"#).unwrap();
        assert_eq!(stats.id, 7);
        assert_eq!(stats.request, Request::Stats { reset: false });
        assert!(serde_json::from_str::<Envelope>(r#"{"cmd":"explode"}"#).is_err());
    }
}
