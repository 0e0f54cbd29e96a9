//! Every frame that was accepted for a NIC that moves is delivered once, in the order of its sender, or is
//! counted as dropped, or was in the hands of a daemon that died. After a deadline that released what had not been
//! marked, order is not certain, and the end that did so says it.

use godwit_protocol::cutover::Counts;

use super::ensure;
use crate::sim::frames::Frame;

/// What a guest got, of how many each sender sent; what was `lost` with a daemon, and what the ends say of the others.
/// Not `exact`: an end may have counted what came and was not acknowledged.
pub fn delivered(
    got: &[Frame],
    sent: &[u16],
    lost: &[Frame],
    ends: &[Counts],
    exact: bool,
) -> Result<(), String> {
    let late = ends.iter().any(|c| c.late);
    let dropped: u64 = ends.iter().map(|c| c.dropped).sum();
    let mut missing = 0;
    for (from, sent) in sent.iter().enumerate() {
        let numbers: Vec<u16> = got.iter().filter(|f| f.from == from).map(|f| f.number).collect();
        let mut sorted = numbers.clone();
        sorted.sort_unstable();
        sorted.dedup();
        ensure(sorted.len() == numbers.len(), || format!("sender {from}: a frame came twice"))?;
        let order = numbers.windows(2).all(|pair| pair[0] < pair[1]);
        ensure(order || late, || format!("sender {from}: out of order"))?;
        missing += u64::from(*sent).saturating_sub(numbers.len() as u64);
    }
    let (died, told) = (lost.len(), dropped + lost.len() as u64);
    ensure(missing == told || (!exact && missing < told), || {
        format!("{missing} are missing, {dropped} are counted, {died} were lost with a daemon")
    })
}
