//! What decides the bits of a fit, told in few words: its settings as texts, and its rows and other tensors as hashes.

use crate::{
    error::Result,
    kmeans::{EmptyClusters, Init, KMeans},
    problem::Problem,
};
use candle_core::{DType, Device, Tensor};
use twox_hash::XxHash3_64;

/// Everything that decides the bits of a fit but the values of its rows: names and values as texts. Devices, memory and the cut into
/// blocks or ranks decide none, and are not in it.
pub(super) struct Fingerprint(Vec<(&'static str, String)>);

/// A setting of two values.
pub(super) struct Difference {
    pub what: &'static str,
    pub got: String,
    pub expected: String,
}

impl Fingerprint {
    /// Of a fit of the problem `p`, one without batch dimensions.
    pub fn new(settings: &KMeans, p: &Problem) -> Result<Self> {
        let KMeans { k, metric, init, n_init, max_iters, tol, seed, weights, empty, check_finite, .. } = settings;
        let init = match init {
            Init::Auto => "auto".into(),
            Init::Random => "random".into(),
            Init::KMeansPlusPlus => "k-means++".into(),
            Init::GreedyKMeansPlusPlus => "greedy k-means++".into(),
            Init::KMeansParallel => "k-means||".into(),
            Init::Even => "even".into(),
            Init::Optimal => "optimal".into(),
            Init::Given(centroids) => format!("given, of hash {:016x}", hash_values(centroids)?),
        };
        let weights = match weights {
            Some(weights) => format!("of hash {:016x}", hash_values(weights)?),
            None => "none".into(),
        };
        let empty = match empty {
            EmptyClusters::Keep => "keep",
            EmptyClusters::Relocate => "relocate",
        };
        Ok(Self(vec![
            ("rows", p.n.to_string()),
            ("columns", p.d.to_string()),
            ("dtype", p.dtype.as_str().into()),
            ("k", k.to_string()),
            ("metric", metric.name().into()),
            ("init", init),
            ("n_init", n_init.to_string()),
            ("max_iters", max_iters.to_string()),
            ("tol", tol.to_string()),
            ("seed", seed.to_string()),
            ("sample_weights", weights),
            ("empty_clusters", empty.into()),
            ("check_finite", check_finite.to_string()),
        ]))
    }

    pub fn settings(&self) -> impl Iterator<Item = (&'static str, &str)> {
        self.0.iter().map(|(name, value)| (*name, value.as_str()))
    }

    /// The first setting that has another value than here.
    pub fn difference(&self, mut other: impl FnMut(&'static str) -> Result<String>) -> Result<Option<Difference>> {
        for (what, expected) in self.settings() {
            let got = other(what)?;
            if got != expected {
                return Ok(Some(Difference { what, got, expected: expected.into() }));
            }
        }
        Ok(None)
    }
}

/// The hash of a tensor's values as f64, which holds them exactly: of the type they are stored in it knows nothing.
fn hash_values(t: &Tensor) -> Result<u64> {
    let values = t.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?;
    let bytes: Vec<u8> = values.into_iter().flat_map(f64::to_le_bytes).collect();
    Ok(XxHash3_64::oneshot(&bytes))
}

/// The hash of rows that lie one after another, of which `first` is the number of the first: the sum, modulo 2^64, of the hash (XXH3,
/// Collet 2019) of each row's bytes with its number as the seed. So hashes of other rows add up, however all rows are cut.
pub(super) fn hash_rows(first: usize, row_bytes: usize, rows: &[u8]) -> u64 {
    let hash = |(i, row)| XxHash3_64::oneshot_with_seed((first + i) as u64, row);
    rows.chunks_exact(row_bytes).enumerate().map(hash).fold(0, u64::wrapping_add)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hashes_of_rows_add_up_however_they_are_cut() {
        let rows: Vec<u8> = (0..40 * 7).map(|i| (i * 31 % 251) as u8).collect();
        let whole = hash_rows(0, 7, &rows);
        for cut in 0..=40 {
            let (a, b) = rows.split_at(cut * 7);
            assert_eq!(hash_rows(0, 7, a).wrapping_add(hash_rows(cut, 7, b)), whole);
        }
        // Rows that change places are others.
        let mut swapped = rows.clone();
        swapped.rotate_left(7);
        assert_ne!(hash_rows(0, 7, &swapped), whole);
        for at in 0..rows.len() {
            let mut other = rows.clone();
            other[at] ^= 1;
            assert_ne!(hash_rows(0, 7, &other), whole);
        }
    }
}
