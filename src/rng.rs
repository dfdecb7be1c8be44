//! Random numbers that belong to a row, not to a position in a stream: a draw depends on the seed, the round, the batch
//! element and the row alone, so any device, chunking or thread count draws the same. `kernels/exact/common.cuh` holds the same
//! functions; only correctly rounded operations are used, so the bits agree.

/// Which draw: the user's seed, the number of the round, and the number that the first of the problems has in their batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Draw {
    pub seed: u64,
    pub round: u64,
    pub first_problem: usize,
}

impl Draw {
    /// Number `i`, from 1 on, of what is drawn beside the keys of a round, which are fewer than 2^32.
    pub fn beside(self, i: u64) -> Self {
        Self { round: self.round.wrapping_add(i << 32), ..self }
    }
}

/// SplitMix64's finaliser (Steele, Lea and Flood 2014).
#[inline]
fn mix(z: u64) -> u64 {
    let z = z.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// A uniform variate in (0, 1), of a row of problem `batch` of those that are drawn for.
#[inline]
pub(crate) fn uniform(draw: Draw, batch: usize, row: usize) -> f64 {
    let h = mix(mix(mix(mix(draw.seed) ^ draw.round) ^ (draw.first_problem + batch) as u64) ^ row as u64);
    ((h >> 12) as f64 + 0.5) * 2f64.powi(-52)
}

/// A standard exponential variate, `-ln(u)` of the uniform one.
#[inline]
pub(crate) fn exponential(draw: Draw, batch: usize, row: usize) -> f64 {
    negative_ln(uniform(draw, batch, row))
}

/// `-ln(u)` for a normal `u`, within a few ulp: `ln(m) = 2 atanh((m - 1) / (m + 1))` by its series.
#[inline]
fn negative_ln(u: f64) -> f64 {
    let mut e = (u.to_bits() >> 52) as i64 - 1023;
    let mut m = f64::from_bits(u.to_bits() & ((1 << 52) - 1) | 1023 << 52);
    if m > std::f64::consts::SQRT_2 {
        m *= 0.5;
        e += 1;
    }
    let s = (m - 1.0) / (m + 1.0);
    let z = s * s;
    let mut series = 1.0 / 23.0;
    for i in (0..11).rev() {
        series = series * z + 1.0 / (2 * i + 1) as f64;
    }
    -(e as f64 * std::f64::consts::LN_2 + 2.0 * s * series)
}

/// The largest key of a row that may be drawn; others have larger ones.
pub(crate) const RACED: f64 = 1e300;

/// The key of a row in an exponential race: the row with the smallest key is a sample with probability proportional to
/// `weight * nearest`, and those with the smallest keys a sample without replacement (Efraimidis and Spirakis 2006).
/// Rows already taken (`nearest < 0`) never win; others of no probability win only when nothing else is left: first those that
/// a row taken before is equal to, then those of no weight, then those of a negative one.
#[inline]
pub(crate) fn race_key(draw: Draw, batch: usize, row: usize, nearest: f64, weight: f64) -> f64 {
    let p = nearest * weight;
    if nearest < 0.0 {
        f64::INFINITY
    } else if p > 0.0 {
        (exponential(draw, batch, row) / p).min(RACED)
    } else if weight > 0.0 {
        2e300
    } else if weight < 0.0 {
        4e300
    } else {
        3e300
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logarithm_is_accurate() {
        for u in [2f64.powi(-53), 1e-9, 0.1, 0.5, 0.707, 0.71, 0.99, 1.0 - 2f64.powi(-53)] {
            let (got, want) = (negative_ln(u), -u.ln());
            assert!((got - want).abs() <= 4e-16 * want.max(1e-16 / 4e-16), "{u}: {got} {want}");
        }
    }

    #[test]
    fn exponentials_have_their_mean_and_variance() {
        let n = 100_000;
        let draw = Draw { seed: 7, round: 3, first_problem: 0 };
        let draws: Vec<f64> = (0..n).map(|i| exponential(draw, 1, i)).collect();
        let mean = draws.iter().sum::<f64>() / n as f64;
        let variance = draws.iter().map(|d| (d - mean) * (d - mean)).sum::<f64>() / n as f64;
        assert!((mean - 1.0).abs() < 0.02 && (variance - 1.0).abs() < 0.05, "{mean} {variance}");
    }
}
