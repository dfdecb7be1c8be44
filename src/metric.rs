//! The four metrics and the one definition of each: what "distance" means to the bit.

/// A distance of a row from a centroid.
///
/// The definitions are of the stored values, in f64, summed over the columns in ascending order without fused
/// multiply-add. Labels on every backend are the lowest index that minimises exactly this number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Metric {
    /// `sum((x - c)^2)`. Centroids are means (Lloyd 1982).
    #[default]
    SquaredEuclidean,
    /// `1 - x.c / (|x| |c|)`, and 1 where either is zero. Centroids are normalised sums of the normalised rows: spherical
    /// k-means (Dhillon and Modha 2001).
    Cosine,
    /// `-x.c`: maximum inner product. Centroids are means. The cost is not bounded below and may rise.
    Dot,
    /// `sum(|x - c|)`. Centroids are component-wise (lower, weighted) medians, which minimise it: k-medians.
    Manhattan,
}

impl Metric {
    /// The name used in plans, records and saved fits.
    pub fn name(self) -> &'static str {
        match self {
            Self::SquaredEuclidean => "squared_euclidean",
            Self::Cosine => "cosine",
            Self::Dot => "dot",
            Self::Manhattan => "manhattan",
        }
    }

    /// The inverse of [`Metric::name`].
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::SquaredEuclidean, Self::Cosine, Self::Dot, Self::Manhattan].into_iter().find(|m| m.name() == name)
    }

    /// The definition. `x` and `c` yield the columns of one row and of one centroid.
    #[inline(always)]
    pub(crate) fn distance(self, pairs: impl Iterator<Item = (f64, f64)>) -> f64 {
        let [distance] = self.distances(pairs.map(|pair| [pair]));
        distance
    }

    /// The same of several pairs of rows, column by column: none waits for the others, so that as many additions go on at once.
    #[inline(always)]
    pub(crate) fn distances<const R: usize>(self, columns: impl Iterator<Item = [(f64, f64); R]>) -> [f64; R] {
        match self {
            Self::SquaredEuclidean => sums(columns, |s, (x, c)| {
                let t = x - c;
                s + t * t
            }),
            Self::Manhattan => sums(columns, |s, (x, c)| s + (x - c).abs()),
            Self::Dot => sums(columns, |s, (x, c)| s + x * c).map(|dot: f64| -dot),
            Self::Cosine => {
                let sums = sums(columns, |[dot, xx, cc]: [f64; 3], (x, c)| [dot + x * c, xx + x * x, cc + c * c]);
                sums.map(|[dot, xx, cc]| {
                    let norms = f64::sqrt(xx) * f64::sqrt(cc);
                    if norms == 0.0 {
                        1.0
                    } else {
                        1.0 - dot / norms
                    }
                })
            }
        }
    }
}

/// Adds the columns up one after another.
#[inline(always)]
fn sums<S: Copy + Default, const R: usize>(
    columns: impl Iterator<Item = [(f64, f64); R]>,
    add: impl Fn(S, (f64, f64)) -> S,
) -> [S; R] {
    columns.fold([S::default(); R], |mut sums, pairs| {
        sums.iter_mut().zip(pairs).for_each(|(sum, pair)| *sum = add(*sum, pair));
        sums
    })
}
