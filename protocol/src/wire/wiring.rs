//! How a VM's NICs are connected, and how that is changed.
//!
//! Owns the form of a NIC's connection and the choice of the NIC that a change means. Never touches a device.

use serde::{Deserialize, Serialize};

use super::filter::Rule;
use crate::id::{Mac, Name};

/// How one NIC of a VM is connected: wherever the VM is, nothing reaches it but by this.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Wiring {
    /// Its address: names it among the VM's NICs.
    pub mac: Mac,
    /// The wire; none: it is on no wire.
    pub wire: Option<Name>,
    /// What may reach it: the first rule that fits decides.
    pub filter: Vec<Rule>,
}

/// What a NIC's connection becomes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Change {
    /// It is on this wire. One that is there already stays.
    Connect(Name),
    /// It is on this wire no more.
    Disconnect(Name),
    /// These are its rules (at most [`crate::limits::RULES`] for all NICs of a VM).
    Filter(Vec<Rule>),
}

impl Change {
    /// The NIC that is meant: the one of that address, else the only one that fits.
    ///
    /// # Errors
    /// None fits, or several do. One line for the user.
    pub fn choose(&self, nics: &[Wiring], mac: Option<Mac>) -> Result<Mac, String> {
        let on = |nic: &Wiring, wire: &Name| nic.wire.as_ref() == Some(wire);
        let (fits, rather): (Vec<_>, Vec<_>) = match self {
            Self::Connect(wire) => (
                find(nics, mac, |nic| nic.wire.is_none() || on(nic, wire)),
                find(nics, mac, |nic| nic.wire.is_none()),
            ),
            Self::Disconnect(wire) => (find(nics, mac, |nic| on(nic, wire)), Vec::new()),
            Self::Filter(_) => (find(nics, mac, |_| true), Vec::new()),
        };
        if let ([one], _) | (_, [one]) = (rather.as_slice(), fits.as_slice()) {
            return Ok(*one);
        }
        let lacks = if fits.is_empty() { "no" } else { "more than one" };
        Err(match self {
            Self::Connect(wire) => format!("{lacks} such NIC is free for wire {wire}"),
            Self::Disconnect(wire) => format!("{lacks} such NIC is on wire {wire}"),
            Self::Filter(_) => format!("{lacks} such NIC is there"),
        })
    }

    /// Changes that NIC. What is so already stays: it can be repeated.
    ///
    /// # Errors
    /// It is not there, or is on another wire. One line for the user; nothing changed.
    pub fn apply(&self, nics: &mut [Wiring], mac: Mac) -> Result<(), String> {
        let nic = nics.iter_mut().find(|nic| nic.mac == mac).ok_or("that NIC is not there")?;
        match self {
            Self::Connect(wire) => match &nic.wire {
                Some(other) if other != wire => return Err(format!("the NIC is on wire {other}")),
                _ => nic.wire = Some(wire.clone()),
            },
            Self::Disconnect(wire) => drop(nic.wire.take_if(|on| on == wire)),
            Self::Filter(rules) => nic.filter.clone_from(rules),
        }
        Ok(())
    }
}

fn find(nics: &[Wiring], mac: Option<Mac>, fits: impl Fn(&Wiring) -> bool) -> Vec<Mac> {
    let meant = |nic: &&Wiring| mac.is_none_or(|mac| mac == nic.mac) && fits(nic);
    nics.iter().filter(meant).map(|nic| nic.mac).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: Mac = Mac([2, 0, 0, 0, 0, 1]);
    const B: Mac = Mac([2, 0, 0, 0, 0, 2]);

    fn nics(wires: [Option<&str>; 2]) -> Vec<Wiring> {
        let nic = |(mac, wire): (Mac, Option<&str>)| Wiring {
            mac,
            wire: wire.map(|w| w.parse().unwrap()),
            filter: Vec::new(),
        };
        [A, B].into_iter().zip(wires).map(nic).collect()
    }

    fn lan() -> Name {
        "lan".parse().unwrap()
    }

    #[test]
    fn the_free_nic_is_connected_and_one_that_is_there_stays() {
        let connect = Change::Connect(lan());
        let mut one = nics([Some("dmz"), None]);
        assert_eq!(connect.choose(&one, None), Ok(B));
        for _ in 0..2 {
            assert_eq!(connect.apply(&mut one, B), Ok(()));
            assert_eq!(one, nics([Some("dmz"), Some("lan")]));
            assert_eq!(connect.choose(&one, None), Ok(B), "again");
        }
        assert!(connect.choose(&one, Some(A)).unwrap_err().contains("no such NIC is free"));
        assert!(connect.apply(&mut one, A).unwrap_err().contains("is on wire dmz"));
        let two = nics([None, None]);
        assert!(connect.choose(&two, None).unwrap_err().contains("more than one"));
        assert_eq!(connect.choose(&two, Some(A)), Ok(A));
        assert_eq!(connect.choose(&nics([Some("lan"), None]), None), Ok(B), "rather the free one");
    }

    #[test]
    fn only_what_is_on_a_wire_is_taken_off_and_that_can_be_repeated() {
        let off = Change::Disconnect(lan());
        let mut both = nics([Some("lan"), Some("dmz")]);
        assert_eq!(off.choose(&both, None), Ok(A));
        for _ in 0..2 {
            assert_eq!(off.apply(&mut both, A), Ok(()));
            assert_eq!(both, nics([None, Some("dmz")]));
        }
        assert_eq!(off.apply(&mut both, B), Ok(()));
        assert_eq!(both, nics([None, Some("dmz")]), "it is on another");
        assert!(off.choose(&both, None).unwrap_err().contains("no such NIC"));
        let same = nics([Some("lan"), Some("lan")]);
        assert!(off.choose(&same, None).unwrap_err().contains("more than one"));
        assert_eq!(off.choose(&same, Some(B)), Ok(B));
    }

    #[test]
    fn rules_are_those_of_one_nic() {
        let rules: Vec<Rule> = vec!["deny any".parse().unwrap()];
        let filter = Change::Filter(rules.clone());
        let mut both = nics([Some("lan"), None]);
        assert!(filter.choose(&both, None).is_err());
        assert_eq!(filter.choose(&both, Some(B)), Ok(B));
        assert_eq!(filter.apply(&mut both, B), Ok(()));
        assert_eq!((&both[0].filter, &both[1].filter), (&Vec::new(), &rules));
        assert!(filter.apply(&mut both, Mac([2; 6])).is_err());
    }
}
