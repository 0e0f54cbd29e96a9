//! Where each VM of a migration goes.
//!
//! Owns the choice, which is arithmetic on what was told: no input or output. Invariant: a VM that is where
//! the target wants it stays, unless it was placed by name.

use std::collections::BTreeMap;

use godwit_protocol::id::HostId;

/// A VM that may move.
#[derive(Debug, Clone)]
pub(super) struct Wish {
    /// Where it is.
    pub from: HostId,
    /// Guest memory, bytes.
    pub memory: u64,
    /// Where it was placed by name.
    pub fixed: Option<HostId>,
}

/// A host that may be chosen.
#[derive(Debug, Clone, Copy)]
pub(super) struct Room {
    pub host: HostId,
    /// Guest memory still to give, bytes.
    pub free: u64,
}

/// Which hosts a migration may choose from.
#[derive(Debug, Clone)]
pub(super) enum Among {
    /// None: who was not placed by name stays.
    Nobody,
    /// These; who is on one of them stays.
    These(Vec<Room>),
    /// Any but the one where it is.
    Others(Vec<Room>),
}

/// The hosts to try for each VM, best first; empty: it stays. The largest VMs choose first, each the host
/// that has most memory left.
pub(super) fn spread(wishes: &[Wish], among: &Among) -> Vec<Vec<HostId>> {
    let rooms: &[Room] = match among {
        Among::Nobody => &[],
        Among::These(rooms) | Among::Others(rooms) => rooms,
    };
    let mut left: BTreeMap<HostId, i128> =
        rooms.iter().map(|r| (r.host, i128::from(r.free))).collect();
    let mut to = vec![Vec::new(); wishes.len()];
    for (wish, to) in wishes.iter().zip(&mut to) {
        if let Some(host) = wish.fixed.filter(|host| *host != wish.from) {
            *left.entry(host).or_default() -= i128::from(wish.memory);
            to.push(host);
        }
    }
    let stays = |wish: &Wish| match among {
        Among::Nobody => true,
        Among::These(rooms) => rooms.iter().any(|r| r.host == wish.from),
        Among::Others(_) => false,
    };
    let mut order: Vec<usize> = (0..wishes.len()).collect();
    order.sort_by_key(|at| std::cmp::Reverse(wishes[*at].memory));
    for at in order {
        let wish = &wishes[at];
        if wish.fixed.is_some() || stays(wish) {
            continue;
        }
        // In the order of the hosts where they are equal.
        let mut hosts: Vec<&Room> = rooms.iter().filter(|r| r.host != wish.from).collect();
        hosts.sort_by_key(|r| std::cmp::Reverse(left.get(&r.host).copied().unwrap_or(0)));
        if let Some(first) = hosts.first() {
            *left.entry(first.host).or_default() -= i128::from(wish.memory);
        }
        to[at] = hosts.iter().map(|r| r.host).collect();
    }
    to
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn host(n: u8) -> HostId {
        HostId([n; 32])
    }

    fn wish(from: u8, gib: u64, fixed: Option<u8>) -> Wish {
        Wish { from: host(from), memory: gib * GIB, fixed: fixed.map(host) }
    }

    fn rooms(all: &[(u8, u64)]) -> Vec<Room> {
        all.iter().map(|(n, gib)| Room { host: host(*n), free: gib * GIB }).collect()
    }

    fn first(to: &[Vec<HostId>]) -> Vec<Option<u8>> {
        to.iter().map(|hosts| hosts.first().map(|h| h.0[0])).collect()
    }

    #[test]
    fn equal_vms_spread_over_equal_hosts() {
        let wishes = [wish(1, 1, None), wish(1, 1, None), wish(2, 1, None), wish(2, 1, None)];
        let to = spread(&wishes, &Among::These(rooms(&[(4, 8), (5, 8)])));
        assert_eq!(first(&to), [Some(4), Some(5), Some(4), Some(5)]);
        assert_eq!(to[0], [host(4), host(5)], "the other host is the second choice");
    }

    #[test]
    fn the_largest_chooses_first_and_who_was_placed_counts() {
        let wishes = [wish(1, 1, None), wish(1, 6, None), wish(1, 4, Some(4))];
        let to = spread(&wishes, &Among::These(rooms(&[(4, 9), (5, 8)])));
        assert_eq!(first(&to), [Some(4), Some(5), Some(4)]);
        assert_eq!(to[2], [host(4)], "nowhere else");
    }

    #[test]
    fn who_is_there_stays_and_auto_leaves() {
        let wishes = [wish(4, 1, None), wish(1, 1, None)];
        let there = rooms(&[(4, 2), (5, 1)]);
        assert_eq!(first(&spread(&wishes, &Among::These(there.clone()))), [None, Some(4)]);
        let auto = spread(&wishes, &Among::Others(there));
        assert_eq!(first(&auto), [Some(5), Some(4)]);
        assert_eq!(first(&spread(&wishes, &Among::Nobody)), [None, None]);
        assert_eq!(first(&spread(&[wish(4, 1, Some(4))], &Among::Nobody)), [None]);
    }
}
