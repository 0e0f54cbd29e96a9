//! Who votes: the owner of a VM tops its voters up to three as hosts join, spread over sites.
//!
//! Owns the choice. Each change is one ordinary decree; membership is a hint for whom to ask.

use super::Core;
use crate::id::{HostId, VmId};
use crate::time::Time;
use crate::wire::record::{Cause, Record, Voter};

/// How often the owner looks at its VMs' voters, milliseconds.
pub(super) const EVERY_MS: u64 = 1_000;
/// How long a proposal outside a move is driven, milliseconds.
pub(super) const PROPOSE_MS: u64 = 10_000;
/// How many voters a VM has as soon as there are hosts enough.
const WANTED: usize = 3;

impl Core {
    /// Proposes more voters for each VM of this host that has too few and is not moving.
    pub(super) fn top_up_voters(&mut self, now: Time) {
        let vms: Vec<VmId> = self.local.keys().copied().collect();
        for vm in vms {
            if self.is_moving(vm) || self.epochs.attempting(vm).is_some() {
                continue;
            }
            let Some(record) = self.epochs.newest(vm).cloned() else { continue };
            let owned = self.local.get(&vm).is_some_and(|l| record.names(vm, self.me.host, l.copy));
            if !owned || record.voters.len() >= WANTED {
                continue;
            }
            if let Some(voters) = self.more_voters(&record) {
                let next =
                    Record { epoch: record.epoch.next(), voters, cause: Cause::Voters, ..record };
                // Refused only if another change is under way: the next look will see it.
                let _ = self.epochs.propose(now, next, now.plus_ms(PROPOSE_MS));
            }
        }
    }

    /// The record's voters and up to [`WANTED`] in all, other sites first; none if nobody new is up.
    fn more_voters(&self, record: &Record) -> Option<Vec<Voter>> {
        let mut voters = record.voters.clone();
        let views: Vec<_> = self.membership.members().collect();
        let site = |host: HostId| {
            if host == self.me.host {
                return Some(self.site.clone());
            }
            views.iter().find(|v| v.host == host).and_then(|v| v.site.clone())
        };
        while voters.len() < WANTED {
            let fresh = self.peers.iter().filter_map(|(host, voter)| {
                let known = voters.iter().any(|v| v.host == *host);
                (self.up.contains(host) && !known).then_some(*voter).flatten()
            });
            let taken: Vec<_> = voters.iter().map(|v| site(v.host)).collect();
            let next = fresh
                .min_by_key(|v| (taken.iter().filter(|s| **s == site(v.host)).count(), v.host))?;
            voters.push(next);
            // A pair has no majority without both: wait for a third rather than name two.
            if voters.len() == 2 && self.up.len() < 2 {
                return None;
            }
        }
        Some(voters)
    }
}
