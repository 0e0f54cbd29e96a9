//! The figures of one run of one side, and their medians.
//!
//! Owns their names and units. A figure that a side does not have is `null`, never zero.

use serde::Serialize;
use serde_json::{Map, Value};

use super::content::Content;

/// The guest of a run.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Guest {
    /// The pristine image that its disk is a copy of.
    pub image: String,
    pub ram_bytes: u64,
    #[serde(flatten)]
    pub content: Content,
    /// Pages that it checked after the move.
    pub pages_verified: u64,
    pub pages_corrupt: u64,
}

/// What only several guests together have.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Together {
    /// From the first to the last STOP.
    pub stop_spread_ms: f64,
    /// From the first to the last RESUME.
    pub resume_spread_ms: f64,
    /// Datagrams that somebody outside sent and did not get back, over all guests.
    pub frames_lost: Option<u64>,
    /// Those that came behind a later one.
    pub frames_reordered: Option<u64>,
}

/// One move of one side.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Run {
    #[serde(skip)]
    pub is_peer: bool,
    /// Both directions, counted by the link from the request to the end of the move.
    pub wan_bytes: u64,
    /// From the request to RESUME at the destination.
    pub total_ms: f64,
    /// From STOP at the source to RESUME at the destination.
    pub downtime_ms: f64,
    /// The longest gap that somebody outside saw.
    pub outage_ms: Option<f64>,
    /// All processes of the side, from the request to the end of the move.
    pub cpu_ms: f64,
    /// The largest of the nodes.
    pub node_rss_anon_peak_bytes: Option<u64>,
    /// The largest growth of a node since the request.
    pub node_rss_anon_above_idle_bytes: Option<u64>,
    /// Share of the link's rate that was used while transferring; none on a link without a rate.
    pub link_use: Option<f64>,
    pub guest: Guest,
    /// Of several that move together.
    #[serde(flatten)]
    pub together: Option<Together>,
    /// Where the time went: milliseconds since the request, and what happened.
    pub timeline: Vec<(f64, String)>,
}

impl Run {
    /// One line for people.
    pub fn line(&self) -> String {
        format!(
            "{:.1} MB on the link ({} of its rate), {:.0} ms, stopped for {:.0} ms, {:.0} ms of CPU, {:.1} MB of memory not zero",
            self.wan_bytes as f64 / 1e6,
            self.link_use.map_or("-".to_owned(), |share| format!("{:.0} %", share * 100.0)),
            self.total_ms,
            self.downtime_ms,
            self.cpu_ms,
            self.guest.content.nonzero_bytes as f64 / 1e6,
        )
    }
}

/// The middle one, or the mean of the two in the middle.
pub(in crate::bench) fn median(mut numbers: Vec<f64>) -> Option<f64> {
    numbers.sort_by(f64::total_cmp);
    let middle = numbers.len() / 2;
    match numbers.len() {
        0 => None,
        n if n % 2 == 1 => numbers.get(middle).copied(),
        _ => Some((numbers[middle - 1] + numbers[middle]) / 2.0),
    }
}

/// A side's figures: of each the median over its runs.
pub(super) fn medians(runs: &[Run]) -> Value {
    let values: Vec<Value> = runs.iter().filter_map(|run| serde_json::to_value(run).ok()).collect();
    let all: Vec<&Value> = values.iter().collect();
    medians_of(&all)
}

fn medians_of(values: &[&Value]) -> Value {
    let Some(Value::Object(first)) = values.first() else { return Value::Null };
    let mut out = Map::new();
    for (key, example) in first {
        let of: Vec<&Value> = values.iter().filter_map(|v| v.get(key)).collect();
        let middle = match example {
            Value::Array(_) => continue,
            Value::Object(_) => medians_of(&of),
            Value::String(_) => example.clone(),
            // Corruption is never averaged away.
            _ if key == "pages_corrupt" => {
                of.iter().filter_map(|v| v.as_u64()).max().map_or(Value::Null, Value::from)
            }
            _ => {
                let numbers = of.iter().filter_map(|v| v.as_f64()).collect();
                median(numbers).map_or(Value::Null, |m| whole(m, example))
            }
        };
        out.insert(key.clone(), middle);
    }
    Value::Object(out)
}

/// Bytes stay whole numbers.
fn whole(number: f64, example: &Value) -> Value {
    if example.is_u64() { Value::from(number.round() as u64) } else { Value::from(number) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn medians_keep_units_nulls_and_corruption() {
        let runs = [
            json!({"wan_bytes": 10, "total_ms": 1.5, "outage_ms": null, "timeline": [1], "guest": {"pages_corrupt": 0}}),
            json!({"wan_bytes": 30, "total_ms": 2.5, "outage_ms": null, "timeline": [1], "guest": {"pages_corrupt": 1}}),
            json!({"wan_bytes": 11, "total_ms": 9.5, "outage_ms": null, "timeline": [1], "guest": {"pages_corrupt": 0}}),
        ];
        let all: Vec<&Value> = runs.iter().collect();
        let expected = json!({"wan_bytes": 11, "total_ms": 2.5, "outage_ms": null, "guest": {"pages_corrupt": 1}});
        assert_eq!(medians_of(&all), expected);
        assert_eq!(median(vec![4.0, 1.0, 2.0, 3.0]), Some(2.5));
        assert_eq!(median(Vec::new()), None);
    }
}
