//! Requests: what a driver asks its core for. Owns the choice of candidates.

use std::collections::BTreeSet;

use godwit_protocol::id::{CopyId, HostId, VmId};
use godwit_protocol::migrate::lead;
use godwit_protocol::migrate::source::Begin;
use godwit_protocol::wire::migrate::{Options, Status};
use godwit_protocol::wire::record::Record;

use super::world::{CLUSTER, VM, World, host, index, migration, vm};

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
        let first = self.cluster().and_then(|r| r.placement.first());
        let Some(lead) = first.map(|p| index(p.host)) else { return false };
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

    /// Host `i` makes a cluster. Refused if it was begun before.
    pub fn create_cluster(&mut self, i: usize) {
        let name = super::world::placed(CLUSTER, 0, CopyId([0; 16])).name;
        self.act(i, |core, now| drop(core.create_cluster(now, CLUSTER, name)));
    }

    /// The newest record of the cluster.
    #[must_use]
    pub fn cluster(&self) -> Option<&Record> {
        let of = |r: &&Record| r.cluster == CLUSTER;
        self.decided.values().filter(of).max_by_key(|r| r.epoch)
    }

    /// The host of VM `k` is asked to let it join.
    pub fn join(&mut self, k: usize) {
        let running = self.running(vm(k));
        let (Some(record), Some((_, at))) = (self.cluster().cloned(), running) else { return };
        self.act(at, |core, now| drop(core.join(now, vm(k), record)));
    }

    /// Host `i` is asked to let VM `k` leave.
    pub fn part(&mut self, i: usize, k: usize) {
        self.act(i, |core, now| drop(core.release(now, CLUSTER, &[vm(k)], false)));
    }
}
