//! Counting numbered datagrams: pure, so that a control run with known faults can be checked exactly.
//!
//! Owns the rule of what is lost, reordered and duplicated. Never reads a clock. Invariant:
//! `received == unique + duplicated` and `lost == sent - unique`.

use serde::{Deserialize, Serialize};

/// First four bytes of every datagram.
pub const MAGIC: u32 = 0x6764_7769;
/// Bytes of the header: magic u32, sequence u64, send time u64 (nanoseconds), all little-endian.
pub const HEADER: usize = 20;
/// Numbers beyond this are not ours: 8 MiB of bitmap at most.
const SEQUENCE_MAX: u64 = 64 << 20;

/// Rows of lost numbers in a report.
const ROWS: usize = 64;

/// Writes the header; `datagram` has at least [`HEADER`] bytes.
pub fn encode(datagram: &mut [u8], sequence: u64, sent_ns: u64) {
    datagram[..4].copy_from_slice(&MAGIC.to_le_bytes());
    datagram[4..12].copy_from_slice(&sequence.to_le_bytes());
    datagram[12..20].copy_from_slice(&sent_ns.to_le_bytes());
}

/// Reads the header: (sequence, send time); none if it is not one of ours.
pub fn decode(datagram: &[u8]) -> Option<(u64, u64)> {
    let magic = u32::from_le_bytes(datagram.get(..4)?.try_into().ok()?);
    let sequence = u64::from_le_bytes(datagram.get(4..12)?.try_into().ok()?);
    let sent_ns = u64::from_le_bytes(datagram.get(12..20)?.try_into().ok()?);
    (magic == MAGIC && sequence < SEQUENCE_MAX).then_some((sequence, sent_ns))
}

/// What a prober saw. Times are milliseconds.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ProbeReport {
    /// Datagrams sent.
    pub sent: u64,
    /// Datagrams that the kernel refused to send (not in `sent`).
    pub send_failed: u64,
    /// Datagrams received, duplicates included.
    pub received: u64,
    /// Different numbers received.
    pub unique: u64,
    /// Numbers sent and never received.
    pub lost: u64,
    /// First receptions of a number below the highest received before.
    pub reordered: u64,
    /// Receptions of a number received before.
    pub duplicated: u64,
    /// Datagrams that are not ours.
    pub foreign: u64,
    /// Datagrams that our own socket dropped because its buffer was full (a flaw of the measurement if not 0).
    pub socket_dropped: u64,
    /// First and last number of each row of lost ones: the first 64 rows.
    pub missing: Vec<(u64, u64)>,
    /// Longest time between two receptions that followed each other: the outage.
    pub longest_gap_ms: f64,
    /// When that gap began, counted from the first datagram sent.
    pub longest_gap_at_ms: f64,
    /// Shortest, mean and longest round trip.
    pub rtt_min_ms: f64,
    /// Mean round trip.
    pub rtt_mean_ms: f64,
    /// Longest round trip.
    pub rtt_max_ms: f64,
}

/// Counts receptions; times are nanoseconds of one clock.
#[derive(Clone, Debug, Default)]
pub struct Counter {
    seen: Vec<u64>,
    highest: Option<u64>,
    last_ns: Option<u64>,
    longest_gap_ns: u64,
    longest_gap_from_ns: u64,
    rtt_sum_ns: u128,
    rtt_min_ns: u64,
    rtt_max_ns: u64,
    received: u64,
    unique: u64,
    reordered: u64,
    duplicated: u64,
    foreign: u64,
}

impl Counter {
    /// A datagram was received at `now_ns`.
    pub fn receive(&mut self, datagram: &[u8], now_ns: u64) {
        let Some((sequence, sent_ns)) = decode(datagram) else {
            self.foreign += 1;
            return;
        };
        self.received += 1;
        if let Some(last) = self.last_ns {
            let gap = now_ns.saturating_sub(last);
            if gap > self.longest_gap_ns {
                (self.longest_gap_ns, self.longest_gap_from_ns) = (gap, last);
            }
        }
        self.last_ns = Some(now_ns);
        if self.mark(sequence) {
            self.duplicated += 1;
            return;
        }
        let rtt = now_ns.saturating_sub(sent_ns);
        self.rtt_min_ns = if self.unique == 0 { rtt } else { self.rtt_min_ns.min(rtt) };
        self.rtt_max_ns = self.rtt_max_ns.max(rtt);
        self.rtt_sum_ns += u128::from(rtt);
        self.unique += 1;
        if self.highest.is_some_and(|highest| sequence < highest) {
            self.reordered += 1;
        }
        self.highest = self.highest.max(Some(sequence));
    }

    /// Different numbers received.
    pub fn unique(&self) -> u64 {
        self.unique
    }

    /// Marks the number; true if it was marked already. `sequence` is below [`SEQUENCE_MAX`], as `decode` checked.
    fn mark(&mut self, sequence: u64) -> bool {
        let (word, bit) = ((sequence / 64) as usize, 1 << (sequence % 64));
        if self.seen.len() <= word {
            self.seen.resize(word + 1, 0);
        }
        let before = self.seen[word] & bit != 0;
        self.seen[word] |= bit;
        before
    }

    /// Rows of numbers below `sent` that were not received.
    fn missing(&self, sent: u64) -> Vec<(u64, u64)> {
        let mut rows: Vec<(u64, u64)> = Vec::new();
        let seen =
            |n: u64| self.seen.get((n / 64) as usize).is_some_and(|w| w & (1 << (n % 64)) != 0);
        for n in (0..sent.min(SEQUENCE_MAX)).filter(|n| !seen(*n)) {
            let full = rows.len() == ROWS;
            match rows.last_mut() {
                Some(row) if row.1 + 1 == n => row.1 = n,
                _ if full => return rows,
                _ => rows.push((n, n)),
            }
        }
        rows
    }

    /// The report, given how many were sent and when the first one was.
    pub fn report(&self, sent: u64, start_ns: u64) -> ProbeReport {
        let ms = |ns: u64| ns as f64 / 1e6;
        ProbeReport {
            sent,
            received: self.received,
            unique: self.unique,
            lost: sent.saturating_sub(self.unique),
            reordered: self.reordered,
            duplicated: self.duplicated,
            foreign: self.foreign,
            missing: self.missing(sent),
            longest_gap_ms: ms(self.longest_gap_ns),
            longest_gap_at_ms: ms(self.longest_gap_from_ns.saturating_sub(start_ns)),
            rtt_min_ms: ms(self.rtt_min_ns),
            rtt_mean_ms: self.rtt_sum_ns as f64 / self.unique.max(1) as f64 / 1e6,
            rtt_max_ms: ms(self.rtt_max_ns),
            ..ProbeReport::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn feed(order: &[(u64, u64)]) -> Counter {
        let mut counter = Counter::default();
        for (sequence, at_ms) in order {
            let mut datagram = [0; 64];
            encode(&mut datagram, *sequence, sequence * 10_000_000);
            counter.receive(&datagram, at_ms * 1_000_000);
        }
        counter
    }

    #[test]
    fn counts_each_kind() {
        // 3 is lost, 5 overtook 4, 2 came twice, and between 70 and 170 nothing came.
        let counter = feed(&[
            (0, 1),
            (1, 11),
            (2, 21),
            (2, 22),
            (5, 52),
            (4, 53),
            (6, 61),
            (7, 70),
            (8, 170),
        ]);
        let report = counter.report(10, 0);
        assert_eq!((report.received, report.unique, report.lost), (9, 8, 2));
        assert_eq!(report.missing, [(3, 3), (9, 9)]);
        assert_eq!((report.reordered, report.duplicated, report.foreign), (1, 1, 0));
        assert_eq!((report.longest_gap_ms, report.longest_gap_at_ms), (100.0, 70.0));
    }

    #[test]
    fn foreign_and_short_datagrams_change_nothing_else() {
        let mut counter = feed(&[(0, 1)]);
        counter.receive(b"short", 5);
        counter.receive(&[0; 64], 5);
        let mut wild = [0; 64];
        encode(&mut wild, u64::MAX, 0);
        counter.receive(&wild, 5);
        let report = counter.report(1, 0);
        assert_eq!((report.received, report.foreign, report.lost), (1, 3, 0));
    }
}
