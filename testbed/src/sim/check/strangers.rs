//! Who is no member changes nothing and learns nothing.

use godwit_protocol::core::Command;
use godwit_protocol::id::HostId;

use super::ensure;

/// What a core does on a stranger's word: nothing is written, done or told to anybody. An answer to the
/// stranger goes nowhere: a node has no connection to it.
pub fn nothing(said: &[Command], stranger: HostId) -> Result<(), String> {
    let harmless = |c: &&Command| matches!(c, Command::Send(to, _) if *to == stranger);
    let harm = said.iter().find(|c| !harmless(c));
    ensure(harm.is_none(), || format!("a stranger's word led to {harm:?}"))
}
