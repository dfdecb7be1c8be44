//! Sums become new centroids.

use super::tensors::Element;
use crate::{
    fixed::{self, Scaled},
    request::Reduction,
};

/// The values that the sums of a cluster are reduced to, if it has the weight for it.
pub(super) fn divided(reduction: Reduction, sums: Vec<Scaled>, weight: impl FnOnce() -> Scaled) -> Option<Vec<f64>> {
    match reduction {
        Reduction::Sum => Some(sums.into_iter().map(Scaled::value).collect()),
        Reduction::Direction => {
            let (values, norm) = Scaled::direction(&sums)?;
            Some(values.into_iter().map(|v| v / norm).collect())
        }
        _ => {
            let weight = weight();
            weight.is_positive().then(|| sums.into_iter().map(|s| s.over(weight)).collect())
        }
    }
}

/// Puts `values` in the place of a centroid, and returns the square of its shift.
pub(super) fn write_centroid<T: Element>(row: &mut [T], mut values: Vec<f64>) -> f64 {
    for (old, v) in row.iter_mut().zip(&mut values) {
        let new = T::narrow(*v);
        let t = if new.wide() == old.wide() { 0.0 } else { new.wide() - old.wide() };
        (*old, *v) = (new, t * t);
    }
    let shift = fixed::striped(&values);
    if shift.is_nan() {
        f64::INFINITY
    } else {
        shift
    }
}
