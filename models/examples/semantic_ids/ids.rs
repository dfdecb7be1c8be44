//! Semantic ids: a few codes for each item, coarse to fine, from what a model says of it.

use anyhow::Result;
use candle_core::{DType, Tensor};
use candle_flash_kmeans::{cluster_means, nearest, nn::ResidualQuantizer, residuals, KMeans, Metric};
use std::collections::HashMap;

/// Assignments of a balanced stage, each of which is followed by new means.
const TURNS: usize = 10;

/// Codes of items, `[item][stage]`.
pub type Codes = Vec<Vec<u32>>;

/// The codes of each row of `x` (n, d), in stages of `k`: residual k-means, each stage of what those before it leave over. And the share of the
/// rows' variance that all leave over.
pub fn residual(x: &Tensor, stages: usize, k: usize) -> Result<(Codes, f64)> {
    let quantizer = ResidualQuantizer::train(x, stages, &KMeans::new(k))?;
    let codes = quantizer.encode(x)?;
    let left = (x - quantizer.decode(&codes)?)?;
    Ok((codes.to_vec2()?, share(&left, x)?))
}

/// The same with stages none of whose codes has more than an even share of the rows: constrained k-means (Bradley, Bennett and Demiriz 2000), whose assignment is
/// greedy here rather than a minimum-cost flow. A stage starts from the centroids of k-means.
pub fn balanced(x: &Tensor, stages: usize, k: usize) -> Result<(Codes, f64)> {
    let (mut left, mut codes) = (x.clone(), vec![vec![]; x.dim(0)?]);
    for stage in 0..stages {
        let mut centroids = KMeans::new(k).seed(stage as u64).fit(&left)?.centroids;
        let mut labels = with_room(&left, &centroids)?;
        for _ in 1..TURNS {
            centroids = cluster_means(&left, &labels, k)?;
            labels = with_room(&left, &centroids)?;
        }
        left = residuals(&left, &cluster_means(&left, &labels, k)?, &labels)?;
        codes.iter_mut().zip(labels.to_vec1::<u32>()?).for_each(|(codes, code)| codes.push(code));
    }
    Ok((codes, share(&left, x)?))
}

/// A code for each row, u32 (n), and at most an even share of the rows for each code: from the nearest pair of a row and a centroid on, a row
/// takes the centroid if that has room.
pub fn with_room(x: &Tensor, centroids: &Tensor) -> Result<Tensor> {
    let (n, k) = (x.dim(0)?, centroids.dim(0)?);
    let (entries, distances) = nearest(x, centroids, k, Metric::SquaredEuclidean)?;
    let (entries, distances) = (entries.flatten_all()?.to_vec1::<u32>()?, distances.flatten_all()?.to_vec1::<f64>()?);
    let mut pairs: Vec<usize> = (0..n * k).collect();
    pairs.sort_by(|&a, &b| distances[a].total_cmp(&distances[b]));
    let (mut room, mut codes) = (vec![n.div_ceil(k); k], vec![None; n]);
    for pair in pairs {
        let (code, entry) = (&mut codes[pair / k], entries[pair]);
        if code.is_none() && room[entry as usize] > 0 {
            room[entry as usize] -= 1;
            *code = Some(entry);
        }
    }
    // All have one, because there is room for all.
    let codes: Vec<u32> = codes.into_iter().flatten().collect();
    Ok(Tensor::from_vec(codes, n, x.device())?)
}

/// What ids are worth.
#[derive(Debug, PartialEq)]
pub struct Quality {
    /// Ids that some item has.
    pub distinct: usize,
    /// Items whose id another item has, too.
    pub sharing: usize,
    /// Items of the id that most have.
    pub most: usize,
    /// The share of items whose most similar other one has the same first code.
    pub near: f64,
}

/// The quality of the ids of items whose rows are `x` (n, d), unit vectors.
pub fn quality(codes: &Codes, x: &Tensor) -> Result<Quality> {
    let mut items = HashMap::new();
    for id in codes {
        *items.entry(id).or_insert(0) += 1;
    }
    // The nearest of unit vectors is the most similar; a row is the nearest to itself, or as near as its copies.
    let closest = nearest(x, x, 2, Metric::SquaredEuclidean)?.0.to_vec2::<u32>()?;
    let other = |item: usize| closest[item].iter().map(|&i| i as usize).find(|&i| i != item);
    let is_near = |item: &usize| other(*item).is_some_and(|other| codes[other][0] == codes[*item][0]);
    Ok(Quality {
        distinct: items.len(),
        sharing: items.values().filter(|&&items| items > 1).sum(),
        most: items.values().copied().max().unwrap_or(0),
        near: (0..codes.len()).filter(is_near).count() as f64 / codes.len() as f64,
    })
}

/// Ids that no two items share: with a last code that counts the items before that have the same others, as in TIGER.
pub fn unique(codes: &Codes) -> Codes {
    let mut seen = HashMap::new();
    let unique = codes.iter().map(|id| {
        let before = seen.entry(id).or_insert(0);
        *before += 1;
        [&id[..], &[*before - 1]].concat()
    });
    unique.collect()
}

/// How many of `n` items would share their id, if each drew its own from so many.
pub fn sharing_by_chance(n: usize, ids: f64) -> f64 {
    n as f64 * (1.0 - (1.0 - 1.0 / ids).powf(n as f64 - 1.0))
}

/// The squares of what is left over, by those of the rows' differences from their mean.
fn share(left: &Tensor, x: &Tensor) -> Result<f64> {
    let squares = |t: &Tensor| t.to_dtype(DType::F64)?.sqr()?.sum_all()?.to_scalar::<f64>();
    Ok(squares(left)? / squares(&x.broadcast_sub(&x.mean_keepdim(0)?)?)?)
}
