//! Requests: what a driver asks its core for. Owns the choice of candidates.

use std::collections::BTreeSet;

use godwit_protocol::id::{HostId, VmId};
use godwit_protocol::migrate::lead;
use godwit_protocol::migrate::source::Begin;
use godwit_protocol::wire::migrate::{Options, Status};

use super::world::{CLUSTER, VM, World, host, index, migration};

impl World {
    /// Asks the host that runs the VM to move it; `order` picks the k-th candidate of the others.
    pub fn ask(&mut self, n: u8, order: impl Fn(usize) -> usize) -> bool {
        let Some((copy, at)) = self.running(VM) else { return false };
        let Some(core) = self.nodes[at].core.as_ref() else { return false };
        let Some(record) = core.newest(VM).cloned() else { return false };
        let others: Vec<HostId> = (0..self.nodes.len()).filter(|j| *j != at).map(host).collect();
        let candidates = (0..others.len()).map(|k| others[order(k)]).collect();
        let on = others[others.len() - 1];
        let status = Status::new(migration(n), VM, record.name.clone(), host(at), on, &record);
        let options = Options { deadline_s: 60, ..Options::default() };
        let spec = b"spec".to_vec();
        let begin = Begin { status, record, copy, spec, options, candidates };
        self.act(at, |core, now| core.request(now, begin)).is_some_and(|r| r.is_ok())
    }

    /// Asks the cluster's lead to move these members, each to the k-th of the other hosts, or the ones
    /// after it.
    pub fn ask_cluster(&mut self, n: u8, to: &[(VmId, usize)]) -> bool {
        let newest = self.decided.values().filter(|r| r.cluster == CLUSTER).max_by_key(|r| r.epoch);
        let lead = index(newest.unwrap().placement[0].host);
        let Some(record) = self.nodes[lead].core.as_ref().and_then(|c| c.newest(CLUSTER)).cloned()
        else {
            return false;
        };
        let others = |vm: VmId, k: usize| {
            let at = record.placement_of(vm).map(|p| p.host);
            let mut hosts: Vec<HostId> =
                (0..self.nodes.len()).map(host).filter(|h| Some(*h) != at).collect();
            let first = k % hosts.len();
            hosts.rotate_left(first);
            hosts
        };
        let members: Vec<_> = to.iter().map(|(vm, k)| (*vm, others(*vm, *k))).collect();
        let on = host(self.nodes.len() - 1);
        let name = record.name.clone();
        let status = Status::new(migration(n), CLUSTER, name, host(lead), on, &record);
        let options = Options { deadline_s: 60, ..Options::default() };
        let begin = lead::Begin { status, record, options, members };
        let asked = self.act(lead, |core, now| core.request_cluster(now, begin));
        let done = asked.is_some_and(|r| r.is_ok());
        if done {
            let team: BTreeSet<VmId> = to.iter().map(|(vm, _)| *vm).collect();
            self.teams.insert(team);
        }
        done
    }
}
