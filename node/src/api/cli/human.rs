//! Sizes, rates and times as people write and read them. Pure functions.

use std::time::Duration;

/// A size in bytes: `512M`, `4G`, `64KiB` are powers of 1024; `512MB` is a power of 1000.
///
/// # Errors
/// One line that shows the right form.
pub fn bytes(text: &str) -> Result<u64, String> {
    let bad = || format!("{text:?} is no size: write a number and a unit, such as 64M or 4G");
    let (number, unit) = split(text).ok_or_else(bad)?;
    let factor: u64 = match unit {
        "B" => 1,
        "K" | "k" | "KiB" => 1 << 10,
        "M" | "MiB" => 1 << 20,
        "G" | "GiB" => 1 << 30,
        "T" | "TiB" => 1 << 40,
        "kB" | "KB" => 1_000,
        "MB" => 1_000_000,
        "GB" => 1_000_000_000,
        "TB" => 1_000_000_000_000,
        _ => return Err(bad()),
    };
    scale(number, factor as f64).ok_or_else(bad)
}

/// A rate in bytes per second: a size as above, or `80Mbit`.
///
/// # Errors
/// One line that shows the right form.
pub fn rate(text: &str) -> Result<u64, String> {
    let bad = || format!("{text:?} is no rate: write bytes per second such as 10M, or 80Mbit");
    let plain = text.strip_suffix("/s").unwrap_or(text);
    let (number, unit) = split(plain).ok_or_else(bad)?;
    let bits = match unit {
        "kbit" | "Kbit" => 1e3,
        "Mbit" => 1e6,
        "Gbit" => 1e9,
        _ => return bytes(plain).ok().filter(|b| *b > 0).ok_or_else(bad),
    };
    scale(number, bits / 8.0).filter(|b| *b > 0).ok_or_else(bad)
}

/// A time: `300ms`, `90s`, `10m`, `1h`, `2d`, and sums such as `1h30m`.
///
/// # Errors
/// One line that shows the right form.
pub fn duration(text: &str) -> Result<Duration, String> {
    let bad = |why: &str| format!("{text:?} is no time: {why}, such as 300ms, 90s, 10m or 1h");
    let mut rest = text;
    let mut total_ms = 0_u64;
    if rest.is_empty() {
        return Err(bad("write a number and a unit"));
    }
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(rest.len());
        let (number, tail) = rest.split_at(digits);
        let letters = tail.find(|c: char| !c.is_ascii_alphabetic()).unwrap_or(tail.len());
        let (unit, tail) = tail.split_at(letters);
        let factor = match unit {
            "ms" => 1.0,
            "s" => 1e3,
            "m" | "min" => 60e3,
            "h" => 3600e3,
            "d" => 86_400e3,
            "" => return Err(bad("write a unit behind the number")),
            _ => return Err(bad("write a unit that is known")),
        };
        let number = number.parse().map_err(|_| bad("write a number and a unit"))?;
        let ms = scale(number, factor).ok_or_else(|| bad("write a smaller number"))?;
        total_ms = total_ms.checked_add(ms).ok_or_else(|| bad("write a smaller number"))?;
        rest = tail;
    }
    match total_ms {
        0 => Err(bad("write one that is longer than nothing")),
        // Ten years: longer is a slip of the hand, and sums of such times must not overflow.
        ms if ms > 315_360_000_000 => Err(bad("write a shorter one")),
        ms => Ok(Duration::from_millis(ms)),
    }
}

/// `209 MiB`, `1.5 GiB`, `17 B`.
#[must_use]
pub fn show_bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let mut value = bytes as f64 / 1024.0;
    let mut unit = 0;
    while value >= 1023.95 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    let digits = usize::from(value < 99.95);
    format!("{value:.digits$} {}", UNITS[unit])
}

/// `850 ms`, `12.3 s`, `4 min 10 s`, `2 h 5 min`.
#[must_use]
pub fn show_ms(ms: u64) -> String {
    let s = ms / 1000;
    match ms {
        0..1_000 => format!("{ms} ms"),
        1_000..60_000 => format!("{:.1} s", ms as f64 / 1000.0),
        60_000..3_600_000 => format!("{} min {} s", s / 60, s % 60),
        _ => format!("{} h {} min", s / 3600, s / 60 % 60),
    }
}

fn split(text: &str) -> Option<(f64, &str)> {
    let at = text.find(|c: char| !c.is_ascii_digit() && c != '.')?;
    let (number, unit) = text.split_at(at);
    Some((number.parse().ok()?, unit.trim_start()))
}

/// `number` times `factor`, if that is exact enough to be meant.
fn scale(number: f64, factor: f64) -> Option<u64> {
    let product = (number * factor).round();
    (product.is_finite() && (0.0..9e15).contains(&product)).then_some(product as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sizes_and_rates() {
        assert_eq!(bytes("512M"), Ok(512 << 20));
        assert_eq!(bytes("1.5GiB"), Ok(3 << 29));
        assert_eq!(bytes("4 GB"), Ok(4_000_000_000));
        assert_eq!(rate("10M"), Ok(10 << 20));
        assert_eq!(rate("10MB/s"), Ok(10_000_000));
        assert_eq!(rate("80Mbit"), Ok(10_000_000));
        for bad in ["", "4", "G", "-1G", "1X", "1..2G", "99999999T", "1G1", "NaNG", "é"] {
            assert!(bytes(bad).is_err(), "{bad}");
        }
        assert!(rate("0M").is_err());
    }

    #[test]
    fn times() {
        assert_eq!(duration("300ms"), Ok(Duration::from_millis(300)));
        assert_eq!(duration("1h30m"), Ok(Duration::from_secs(5400)));
        assert_eq!(duration("0.5s"), Ok(Duration::from_millis(500)));
        for bad in ["", "300", "0s", "1y", "m", "-1s", "1h 30m", "999999999999d", "4000d"] {
            assert!(duration(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn shown_forms() {
        assert_eq!(show_bytes(17), "17 B");
        assert_eq!(show_bytes(209 << 20), "209 MiB");
        assert_eq!(show_bytes((1 << 20) - 1), "1.0 MiB");
        assert_eq!(show_bytes(3 << 29), "1.5 GiB");
        assert_eq!(show_ms(850), "850 ms");
        assert_eq!(show_ms(12_300), "12.3 s");
        assert_eq!(show_ms(250_000), "4 min 10 s");
        assert_eq!(show_ms(7_500_000), "2 h 5 min");
    }

    proptest! {
        #[test]
        fn nothing_that_is_typed_panics(text in ".{0,12}") {
            let _ = (bytes(&text), rate(&text), duration(&text));
        }
    }
}
