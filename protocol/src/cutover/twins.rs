//! A broadcast or multicast goes to both hosts: of its two copies the guest gets one.
//!
//! Owns which of them came and whose other copy did not. Invariant: it remembers a bounded number; beyond that a frame may come
//! twice, and none is lost.

use std::collections::BTreeMap;

use crate::limits::CUTOVER_GROUPS;

/// The way by which a copy came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    /// In the tail.
    Tail,
    /// Straight to the new host.
    Own,
}

/// By content, how many more came in the tail than by the other way.
#[derive(Debug, Default)]
pub(super) struct Twins(BTreeMap<[u8; 16], i32>);

impl Twins {
    /// A frame came by this way; false: its other copy came before.
    pub fn is_first(&mut self, frame: &[u8], way: Way) -> bool {
        if frame.first().is_none_or(|byte| byte & 1 == 0) {
            return true;
        }
        let mut key = [0; 16];
        key.copy_from_slice(&blake3::hash(frame).as_bytes()[..16]);
        let known = self.0.get(&key).copied().unwrap_or(0);
        let (more, first) = match way {
            Way::Tail => (known.saturating_add(1), known >= 0),
            Way::Own => (known.saturating_sub(1), known <= 0),
        };
        if more == 0 {
            self.0.remove(&key);
        } else if known != 0 || self.0.len() < CUTOVER_GROUPS {
            self.0.insert(key, more);
        }
        first
    }
}
