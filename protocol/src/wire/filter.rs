//! Filters: which packets may reach a NIC.
//!
//! Owns the form of a rule and how people write it. Never touches a packet: the kernel does, by what is here. Invariant:
//! a list of rules means the same on every host; the first rule that fits decides, and without one a packet passes.
//!
//! ```text
//!   rule = ("allow" | "deny") ("any" | "tcp" | "udp" | "icmp") [PORT] ["from" ADDRESS[/PREFIX]]
//! ```
//!
//! Rules are about IPv4 and IPv6. ARP and neighbour discovery always pass: without them nothing else would.

use core::net::IpAddr;
use std::fmt;
use std::str::FromStr;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// What a rule is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Protocol {
    /// Every packet.
    Any,
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// ICMP and ICMPv6.
    Icmp,
}

/// One rule. People and files see its text, messages carry its fields.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Rule {
    /// Whether what fits may pass.
    pub allow: bool,
    /// What it is about.
    pub protocol: Protocol,
    /// The guest's port; none: each.
    pub port: Option<u16>,
    /// The sender's network and the length of its prefix; none: each.
    pub from: Option<(IpAddr, u8)>,
}

/// Why a text is no rule.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is no rule: {1}; write for example \"allow tcp 22 from 10.0.0.0/8\" or \"deny any\""
)]
pub struct RuleError(String, &'static str);

impl FromStr for Rule {
    type Err = RuleError;

    fn from_str(text: &str) -> Result<Self, RuleError> {
        let bad = |why| RuleError(text.chars().take(80).collect(), why);
        let mut words = text.split_whitespace().peekable();
        let allow = match words.next() {
            Some("allow") => true,
            Some("deny") => false,
            _ => return Err(bad("it begins with allow or deny")),
        };
        let protocol = match words.next() {
            Some("any") => Protocol::Any,
            Some("tcp") => Protocol::Tcp,
            Some("udp") => Protocol::Udp,
            Some("icmp") => Protocol::Icmp,
            _ => return Err(bad("any, tcp, udp or icmp follows")),
        };
        let port = words.next_if(|word| *word != "from").map(str::parse::<u16>).transpose();
        let port = port.map_err(|_| bad("a port is 1 to 65535"))?;
        let ports = matches!(protocol, Protocol::Tcp | Protocol::Udp);
        if port == Some(0) || (port.is_some() && !ports) {
            return Err(bad("only tcp and udp have ports, 1 to 65535"));
        }
        let from =
            match (words.next(), words.next()) {
                (None, _) => None,
                (Some(_), Some(network)) => Some(prefix(network).ok_or_else(|| {
                    bad("after from comes a network, all bits after its prefix 0")
                })?),
                (Some(_), None) => return Err(bad("after from comes an address")),
            };
        match words.next() {
            Some(_) => Err(bad("something follows")),
            None => Ok(Self { allow, protocol, port, from }),
        }
    }
}

fn prefix(text: &str) -> Option<(IpAddr, u8)> {
    let (address, length) = match text.split_once('/') {
        Some((address, length)) => (address, Some(length.parse::<u8>().ok()?)),
        None => (text, None),
    };
    let address: IpAddr = address.parse().ok()?;
    let whole = if address.is_ipv4() { 32 } else { 128 };
    let length = length.unwrap_or(whole);
    let rest_is_zero = match address {
        _ if length > whole => false,
        IpAddr::V4(a) => a.to_bits().checked_shl(u32::from(length)).unwrap_or(0) == 0,
        IpAddr::V6(a) => a.to_bits().checked_shl(u32::from(length)).unwrap_or(0) == 0,
    };
    rest_is_zero.then_some((address, length))
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let action = if self.allow { "allow" } else { "deny" };
        let protocol = match self.protocol {
            Protocol::Any => "any",
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
            Protocol::Icmp => "icmp",
        };
        write!(f, "{action} {protocol}")?;
        self.port.map_or(Ok(()), |port| write!(f, " {port}"))?;
        self.from.map_or(Ok(()), |(address, length)| write!(f, " from {address}/{length}"))
    }
}

/// A rule's fields, in their order.
type Fields = (bool, Protocol, Option<u16>, Option<(IpAddr, u8)>);

impl Serialize for Rule {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if serializer.is_human_readable() {
            return serializer.collect_str(self);
        }
        let fields: Fields = (self.allow, self.protocol, self.port, self.from);
        fields.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Rule {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        if deserializer.is_human_readable() {
            return String::deserialize(deserializer)?.parse().map_err(D::Error::custom);
        }
        let (allow, protocol, port, from) = Fields::deserialize(deserializer)?;
        let rule = Self { allow, protocol, port, from };
        // What its text cannot say is no rule.
        rule.to_string().parse().map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::codec;

    /// More than any rule takes.
    const RULE_BYTES: usize = 128;

    #[test]
    fn rules_read_back_as_they_were_written() {
        for text in [
            "deny any",
            "allow tcp 22 from 10.0.0.0/8",
            "allow udp 53",
            "deny icmp from fd00::/8",
            "allow any from 192.0.2.1/32",
            "deny any from 0.0.0.0/0",
        ] {
            let rule: Rule = text.parse().unwrap();
            assert_eq!(rule.to_string(), text);
            let bytes = codec::encode(&rule, RULE_BYTES).unwrap();
            assert!(bytes.len() <= 25, "{} bytes", bytes.len());
            assert_eq!(codec::decode::<Rule, RULE_BYTES>(&bytes), Ok(rule));
        }
        let fields: Fields = (true, Protocol::Icmp, Some(8), None);
        let bytes = codec::encode(&fields, RULE_BYTES).unwrap();
        assert!(codec::decode::<Rule, RULE_BYTES>(&bytes).is_err(), "icmp has no ports");
        let one: Rule = "allow  tcp from 192.0.2.1".parse().unwrap();
        assert_eq!(one.to_string(), "allow tcp from 192.0.2.1/32");
    }

    #[test]
    fn what_is_no_rule_is_refused_with_a_reason() {
        for (text, says) in [
            ("", "allow or deny"),
            ("allow", "any, tcp"),
            ("allow icmp 8", "only tcp and udp"),
            ("allow any 8", "only tcp and udp"),
            ("allow tcp 0", "1 to 65535"),
            ("allow tcp 70000", "1 to 65535"),
            ("allow tcp 22 from", "comes an address"),
            ("allow tcp from 10.0.0.1/8", "after its prefix"),
            ("allow tcp from 10.0.0.0/33", "after its prefix"),
            ("allow tcp from nowhere", "after its prefix"),
            ("deny any from 10.0.0.0/8 please", "something follows"),
        ] {
            let error = text.parse::<Rule>().unwrap_err().to_string();
            assert!(error.contains(says), "{text}: {error}");
        }
    }

    proptest::proptest! {
        #[test]
        fn any_text_is_a_rule_or_an_error(text in "(allow|deny)? ?(tcp|any)? ?.{0,40}") {
            if let Ok(rule) = text.parse::<Rule>() {
                assert_eq!(rule.to_string().parse::<Rule>(), Ok(rule));
            }
        }
    }
}
