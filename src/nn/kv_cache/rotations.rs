//! Rotations of keys and values that become codes.
//!
//! A score is the same of a query and a key that are both rotated, `(q R) . (k R) = q . k`, and so is a sum of values that is rotated back. All
//! that a cache holds is rotated from the first codes on: what is no code and the means of clusters, too, so that whatever reads them needs
//! a query that was rotated once, and gives an output that is rotated back once.

use super::{
    codes::{sample_of, Pieces},
    Stored,
};
use crate::{
    error::Result,
    functional::{means_by_order, rows_of, sort_by_cluster},
    host,
    kmeans::KMeans,
    nn::{
        codebook::orthogonal::{check_rotation, rotated},
        Rotation,
    },
    request::Order,
    saved::Saved,
};
use candle_core::Tensor;

/// The names of the rotations in a file.
const NAMES: [&str; 2] = ["keys_rotation", "values_rotation"];
const GIVEN: [&str; 2] = ["keys_given_rotation", "values_given_rotation"];

/// Of keys and of values.
#[derive(Clone, Debug)]
pub(super) struct Rotations {
    pub(super) wanted: [Rotation; 2],
    /// The matrices, `(d, d)` or `(batch, kv_heads, d, d)`, once there have been codes.
    pub(super) found: [Option<Tensor>; 2],
}

impl Rotations {
    pub(super) fn new(wanted: [Rotation; 2]) -> Self {
        Self { wanted, found: [None, None] }
    }

    /// Refuses given ones that are not orthogonal or not for keys and values of `widths` columns. The host waits for those.
    pub(super) fn check(&self, kv_heads: usize, widths: [usize; 2]) -> Result<()> {
        self.wanted.iter().zip(widths).try_for_each(|(wanted, d)| match wanted {
            Rotation::Given(matrix) => check_rotation(matrix, &[kv_heads], d),
            _ => Ok(()),
        })
    }

    /// Whether there are to be some that have not been found yet.
    pub(super) fn waits(&self) -> bool {
        let wanted = self.wanted.iter().any(|wanted| !matches!(wanted, Rotation::None));
        wanted && self.found.iter().all(Option::is_none)
    }

    /// Those of all `layers`, found for the finite keys and values that become codes, which are returned as they are kept then, for
    /// layers that have none yet. Tokens `(layers * batch, kv_heads, m, d)` are of `k` clusters with these `labels`.
    pub(super) fn find(
        layers: &[&Self],
        tokens: [Tensor; 2],
        labels: &Tensor,
        k: usize,
        pieces: [Pieces; 2],
    ) -> Result<(Vec<Self>, [Tensor; 2])> {
        let mut all: Vec<_> = layers.iter().map(|&layer| layer.clone()).collect();
        if !all.iter().any(Self::waits) {
            return Ok((all, tokens));
        }
        let batch = labels.dims()[0] / layers.len();
        let mut kept = [vec![], vec![]];
        for (i, rotations) in all.iter_mut().enumerate() {
            let of_layer = |t: &Tensor| t.narrow(0, i * batch, batch);
            let [mut keys, mut values] = [of_layer(&tokens[0])?, of_layer(&tokens[1])?];
            if rotations.waits() {
                *rotations = rotations.found_for([&keys, &values], &of_layer(labels)?, k, pieces)?;
                (keys, values) = (rotations.keys(&keys)?, rotations.values(&values)?);
            }
            kept[0].push(keys);
            kept[1].push(values);
        }
        Ok((all, [Tensor::cat(&kept[0], 0)?, Tensor::cat(&kept[1], 0)?]))
    }

    /// The same of one layer.
    fn found_for(&self, tokens: [&Tensor; 2], labels: &Tensor, k: usize, pieces: [Pieces; 2]) -> Result<Self> {
        self.check(tokens[0].dims()[1], tokens.map(|t| t.dims()[3]))?;
        let find = |i: usize| {
            let (x, (batch, heads, _, d)) = (tokens[i], tokens[i].dims4()?);
            match &self.wanted[i] {
                Rotation::Given(matrix) if matrix.rank() == 3 => {
                    let own = host::to_device(matrix, x.device())?.broadcast_as((batch, heads, d, d))?.contiguous()?;
                    Rotation::Given(own).matrix(x, 1, &KMeans::new(1))
                }
                Rotation::Pca => Rotation::Pca.matrix(&rest(x, labels, k)?, d / pieces[i].columns, &KMeans::new(1)),
                wanted => wanted.matrix(x, 1, &KMeans::new(1)),
            }
        };
        Ok(Self { wanted: self.wanted.clone(), found: [find(0)?, find(1)?] })
    }

    /// Keys as they are kept, or queries, whose heads are as many for each of the keys', as they meet these.
    pub(super) fn keys(&self, t: &Tensor) -> Result<Tensor> {
        turned(t, self.found[0].as_ref(), false)
    }

    /// Values as they are kept.
    pub(super) fn values(&self, t: &Tensor) -> Result<Tensor> {
        turned(t, self.found[1].as_ref(), false)
    }

    /// The reverse of [`keys`](Self::keys).
    pub(super) fn keys_back(&self, t: &Tensor) -> Result<Tensor> {
        turned(t, self.found[0].as_ref(), true)
    }

    /// The reverse of [`values`](Self::values), and of outputs.
    pub(super) fn values_back(&self, t: &Tensor) -> Result<Tensor> {
        turned(t, self.found[1].as_ref(), true)
    }

    /// What is stored as it is kept.
    pub(super) fn stored(&self, stored: Stored) -> Result<Stored> {
        Ok(Stored { keys: self.keys(&stored.keys)?, values: self.values(&stored.values)?, ..stored })
    }

    /// Those of other sequences of the batch.
    pub(super) fn map(&self, f: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Self> {
        let found = |matrix: &Option<Tensor>| match matrix {
            Some(matrix) if matrix.rank() == 4 => f(matrix).map(Some),
            other => Ok(other.clone()),
        };
        let [keys, values] = self.found.each_ref().map(found);
        Ok(Self { wanted: self.wanted.clone(), found: [keys?, values?] })
    }

    /// None found yet.
    pub(super) fn anew(&self) -> Self {
        Self::new(self.wanted.clone())
    }

    pub(super) fn are_found(&self) -> bool {
        self.found.iter().any(Option::is_some)
    }

    /// The settings of a file.
    pub(super) fn settings(&self) -> impl Iterator<Item = (&'static str, String)> + '_ {
        let text = |wanted: &Rotation| match wanted {
            Rotation::None => None,
            Rotation::Random { seed } => Some(seed.to_string()),
            Rotation::Pca => Some("pca".into()),
            Rotation::Given(_) => Some("given".into()),
        };
        NAMES.into_iter().zip(&self.wanted).filter_map(move |(name, wanted)| Some((name, text(wanted)?)))
    }

    /// The tensors of a file.
    pub(super) fn tensors(&self) -> impl Iterator<Item = (&'static str, &Tensor)> {
        let given = self.wanted.iter().map(|wanted| match wanted {
            Rotation::Given(matrix) => Some(matrix),
            _ => None,
        });
        let given = GIVEN.into_iter().zip(given);
        let all = NAMES.into_iter().zip(self.found.iter().map(Option::as_ref)).chain(given);
        all.filter_map(|(name, t)| Some((name, t?)))
    }

    /// Those of a file, whose tokens are rotated if they are `found`.
    pub(super) fn read(file: &mut Saved, found: bool) -> Result<Self> {
        let mut all = Self::new([Rotation::None, Rotation::None]);
        for (i, name) in NAMES.into_iter().enumerate().filter(|(_, name)| file.states(name)).collect::<Vec<_>>() {
            let text = file.setting::<String>(name)?;
            all.wanted[i] = match text.as_str() {
                "pca" => Rotation::Pca,
                "given" => Rotation::Given(file.take(GIVEN[i])?),
                _ => Rotation::Random { seed: file.setting(name)? },
            };
            if found {
                all.found[i] = Some(file.take(name)?);
            }
        }
        Ok(all)
    }
}

/// Rows `(batch, heads, n, d)`, where a matrix of each key head serves as many neighbouring heads.
fn turned(rows: &Tensor, matrix: Option<&Tensor>, back: bool) -> Result<Tensor> {
    let Some(matrix) = matrix.filter(|_| rows.elem_count() > 0) else { return Ok(rows.clone()) };
    let (batch, heads, n, d) = rows.dims4()?;
    let own = match *matrix.dims() {
        [_, kv_heads, _, _] => rows.reshape((batch, kv_heads, heads / kv_heads * n, d))?,
        _ => rows.clone(),
    };
    Ok(rotated(&own, matrix, back)?.reshape(rows.shape())?)
}

/// The differences of evenly spaced rows of `x` `(batch, kv_heads, m, d)` from the means of their clusters.
fn rest(x: &Tensor, labels: &Tensor, k: usize) -> Result<Tensor> {
    let (order, offsets) = sort_by_cluster(labels, k)?;
    let labels = labels.contiguous()?;
    let means = means_by_order(x, &Order::of_heads(&labels, &order, &offsets)?)?;
    let spaced = sample_of(x.dims()[2], x.device())?;
    let sample = |t: &Tensor| t.index_select(&spaced, 2);
    Ok((sample(x)? - rows_of(&means, &sample(&labels)?)?)?)
}
