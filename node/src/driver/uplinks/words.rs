//! What hosts have said of a wire's gateway, and which of it counts.
//!
//! Owns the rule, and touches nothing. The newest word counts, so that all that have heard the same are of one mind; a word
//! is newer than all that its host had heard. Another address than the one that counts can be named only when nobody who
//! has that one is there to ask.

use std::net::Ipv4Addr;

use godwit_protocol::id::{Epoch, HostId, Name};
use godwit_protocol::wire::route::{Kind, Route};
use serde::{Deserialize, Serialize};

use crate::api::types::ApiError;

/// Bits that name a subnet with room for a gateway and a guest.
const PREFIXES: std::ops::RangeInclusive<u8> = 1..=30;

/// A gateway as it was named. The greatest counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(in super::super) struct Word {
    pub since: Epoch,
    pub gateway: Ipv4Addr,
    pub prefix: u8,
}

impl Word {
    /// What a route says of its wire's gateway.
    pub fn of(route: &Route) -> Option<Self> {
        let Kind::Uplink { gateway, prefix, since } = route.kind else { return None };
        Some(Self { since, gateway, prefix })
    }

    /// Whether both name one gateway.
    pub fn agrees(&self, other: &Self) -> bool {
        self.names((other.gateway, other.prefix))
    }

    fn names(&self, given: (Ipv4Addr, u8)) -> bool {
        (self.gateway, self.prefix) == given
    }
}

impl std::fmt::Display for Word {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.gateway, self.prefix)
    }
}

/// Who said it, and whether it has taken it back.
#[derive(Debug, Clone)]
pub(super) struct Said {
    pub host: HostId,
    pub word: Word,
    pub gone: bool,
}

/// All that was said of the wire's gateway.
pub(super) fn said(routes: &[Route], wire: &Name) -> Vec<Said> {
    let on_wire = |r: &&Route| r.nics.iter().any(|nic| nic.wire == *wire);
    let said = |r: &Route| Word::of(r).map(|word| Said { host: r.host, word, gone: r.gone });
    routes.iter().filter(on_wire).filter_map(said).collect()
}

/// The word that counts.
pub(super) fn newest(said: &[Said]) -> Option<Word> {
    said.iter().filter(|s| !s.gone).map(|s| s.word).max()
}

/// Why a gateway is not to be had.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Refused {
    /// Nobody has named one.
    Unnamed,
    /// These have another, and can be asked.
    Elsewhere(Word, Vec<HostId>),
    /// These have another, and are not reached.
    Unreached(Word, Vec<HostId>),
}

/// What the gateway of a wire is to be for one more host. `others`: what the others have said; `replace`: whoever has
/// another and is not reached is gone for good.
pub(super) fn agree(
    others: &[Said],
    given: Option<(Ipv4Addr, u8)>,
    replace: bool,
    reached: impl Fn(HostId) -> bool,
    clock: Epoch,
) -> Result<Word, Refused> {
    let (gateway, prefix) = match (given, newest(others)) {
        (None, None) => return Err(Refused::Unnamed),
        (None, Some(word)) => return Ok(word),
        (Some(given), Some(word)) if word.names(given) => return Ok(word),
        (Some(given), Some(word)) => {
            let have = others.iter().filter(|s| !s.gone).map(|s| s.host);
            let (there, away): (Vec<_>, Vec<_>) = have.partition(|host| reached(*host));
            if !there.is_empty() {
                return Err(Refused::Elsewhere(word, there));
            }
            if !replace {
                return Err(Refused::Unreached(word, away));
            }
            given
        }
        (Some(given), None) => given,
    };
    let known = others.iter().map(|s| s.word.since.next()).max().unwrap_or_default();
    Ok(Word { since: clock.max(known), gateway, prefix })
}

/// Reads `10.5.0.1/24`.
pub(super) fn read(text: &str) -> Result<(Ipv4Addr, u8), ApiError> {
    let parts = text.split_once('/');
    let parsed = parts.and_then(|(ip, prefix)| Some((ip.parse().ok()?, prefix.parse().ok()?)));
    let usable = |(ip, prefix): &(Ipv4Addr, u8)| {
        let all = u32::MAX.checked_shr(u32::from(*prefix)).unwrap_or(0);
        let host = ip.to_bits() & all;
        let special = ip.is_multicast() || ip.is_loopback() || ip.is_unspecified();
        PREFIXES.contains(prefix) && !special && host != 0 && host != all
    };
    parsed.filter(usable).ok_or_else(|| {
        ApiError::new(
            format!("{text} is no host's address in an IPv4 subnet"),
            "write it as 10.5.0.1/24; IPv6 is carried inside wires, not routed out of them",
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: (Ipv4Addr, u8) = (Ipv4Addr::new(10, 5, 0, 1), 24);
    const TWO: (Ipv4Addr, u8) = (Ipv4Addr::new(10, 5, 0, 2), 24);
    const CLOCK: Epoch = Epoch(50);

    fn host(n: u8) -> HostId {
        HostId([n; 32])
    }

    fn says(n: u8, (gateway, prefix): (Ipv4Addr, u8), since: u64) -> Said {
        let word = Word { since: Epoch(since), gateway, prefix };
        Said { host: host(n), word, gone: false }
    }

    #[test]
    fn a_gateway_is_an_address_that_a_host_can_have() {
        assert_eq!(read("10.5.0.1/24").unwrap(), ONE);
        for bad in [
            "10.5.0.1",
            "10.5.0.0/24",
            "10.5.0.255/24",
            "10.5.0.1/31",
            "10.5.0.1/0",
            "10.5.0.1/33",
            "224.0.0.1/24",
            "127.0.0.1/8",
            "fd00::1/64",
            "10.5.0.1/200",
            "",
            "/24",
            "10.5.0.1/x",
        ] {
            assert!(read(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn who_names_nothing_takes_what_counts() {
        let none = agree(&[], None, false, |_| true, CLOCK);
        assert_eq!(none, Err(Refused::Unnamed));
        let others = [says(1, ONE, 7), says(2, TWO, 9), Said { gone: true, ..says(3, ONE, 99) }];
        let taken = agree(&others, None, false, |_| false, CLOCK).unwrap();
        assert_eq!(taken, others[1].word);
        assert_eq!(agree(&others, Some(TWO), false, |_| true, CLOCK), Ok(taken));
    }

    #[test]
    fn another_gateway_is_named_only_when_nobody_has_the_first() {
        let others = [says(1, ONE, 7), says(2, ONE, 99)];
        let word = others[1].word;
        let ask =
            |replace, there: u8| agree(&others, Some(TWO), replace, |h| h == host(there), CLOCK);
        for replace in [false, true] {
            assert_eq!(ask(replace, 2), Err(Refused::Elsewhere(word, vec![host(2)])));
        }
        assert_eq!(ask(false, 9), Err(Refused::Unreached(word, vec![host(1), host(2)])));
        let new = ask(true, 9).unwrap();
        assert!(new.names(TWO) && new.since == Epoch(100), "newer than a clock that is ahead");
        let mut all = others.to_vec();
        all.push(Said { host: host(3), word: new, gone: false });
        assert_eq!(newest(&all), Some(new), "who comes back finds it newer than its own");
    }

    #[test]
    fn what_is_taken_back_is_not_in_the_way_and_not_newer() {
        let others = [Said { gone: true, ..says(1, ONE, 70) }];
        let new = agree(&others, Some(TWO), false, |_| true, CLOCK).unwrap();
        assert!(new.names(TWO) && new.since == Epoch(71));
    }

    #[test]
    fn all_are_of_one_mind_whatever_was_heard_first() {
        let mut all = vec![says(1, ONE, 50), says(2, TWO, 50), says(3, ONE, 49)];
        let first = newest(&all);
        all.reverse();
        assert_eq!((first, newest(&all)), (Some(all[1].word), first));
    }
}
