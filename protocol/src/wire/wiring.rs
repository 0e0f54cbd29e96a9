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
    /// Changes the NIC that is meant: the one of that address, else the only one that fits. Gives its address.
    ///
    /// # Errors
    /// None fits, or several do. One line for the user; nothing changed.
    pub fn apply(&self, nics: &mut [Wiring], mac: Option<Mac>) -> Result<Mac, String> {
        let on = |nic: &Wiring, wire: &Name| nic.wire.as_ref() == Some(wire);
        let (fits, rather): (Vec<_>, Vec<_>) = match self {
            Self::Connect(wire) => (
                find(nics, mac, |nic| nic.wire.is_none() || on(nic, wire)),
                find(nics, mac, |nic| nic.wire.is_none()),
            ),
            Self::Disconnect(wire) => (find(nics, mac, |nic| on(nic, wire)), Vec::new()),
            Self::Filter(_) => (find(nics, mac, |_| true), Vec::new()),
        };
        let (([index], _) | (_, [index])) = (rather.as_slice(), fits.as_slice()) else {
            let lacks = if fits.is_empty() { "no" } else { "more than one" };
            return Err(match self {
                Self::Connect(wire) => format!("{lacks} such NIC is free for wire {wire}"),
                Self::Disconnect(wire) => format!("{lacks} such NIC is on wire {wire}"),
                Self::Filter(_) => format!("{lacks} such NIC is there"),
            });
        };
        let nic = &mut nics[*index];
        match self {
            Self::Connect(wire) => nic.wire = Some(wire.clone()),
            Self::Disconnect(_) => nic.wire = None,
            Self::Filter(rules) => nic.filter.clone_from(rules),
        }
        Ok(nic.mac)
    }
}

fn find(nics: &[Wiring], mac: Option<Mac>, fits: impl Fn(&Wiring) -> bool) -> Vec<usize> {
    let meant = |nic: &Wiring| mac.is_none_or(|mac| mac == nic.mac) && fits(nic);
    nics.iter().enumerate().filter(|(_, nic)| meant(nic)).map(|(index, _)| index).collect()
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
        assert_eq!(connect.apply(&mut one, None), Ok(B));
        assert_eq!(one, nics([Some("dmz"), Some("lan")]));
        assert_eq!(connect.apply(&mut one, None), Ok(B), "again");
        assert_eq!(one, nics([Some("dmz"), Some("lan")]));
        assert!(connect.apply(&mut one, Some(A)).unwrap_err().contains("no such NIC is free"));
        let mut two = nics([None, None]);
        assert!(connect.apply(&mut two, None).unwrap_err().contains("more than one"));
        assert_eq!(two, nics([None, None]));
        assert_eq!(connect.apply(&mut two, Some(A)), Ok(A));
        assert_eq!(connect.apply(&mut two, None), Ok(B), "rather the free one");
    }

    #[test]
    fn only_what_is_on_a_wire_is_taken_off() {
        let mut both = nics([Some("lan"), Some("dmz")]);
        assert_eq!(Change::Disconnect(lan()).apply(&mut both, None), Ok(A));
        assert_eq!(both, nics([None, Some("dmz")]));
        assert!(Change::Disconnect(lan()).apply(&mut both, None).is_err());
        let mut same = nics([Some("lan"), Some("lan")]);
        assert!(Change::Disconnect(lan()).apply(&mut same, None).is_err());
        assert_eq!(Change::Disconnect(lan()).apply(&mut same, Some(B)), Ok(B));
    }

    #[test]
    fn rules_are_those_of_one_nic() {
        let rules = vec!["deny any".parse().unwrap()];
        let mut both = nics([Some("lan"), None]);
        assert!(Change::Filter(rules.clone()).apply(&mut both, None).is_err());
        assert_eq!(Change::Filter(rules.clone()).apply(&mut both, Some(B)), Ok(B));
        assert_eq!((&both[0].filter, &both[1].filter), (&Vec::new(), &rules));
    }
}
