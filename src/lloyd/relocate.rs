//! Clusters that are empty get the rows that are farthest from their centroids.

use super::{
    feed::{Block, Feed},
    prepared::RUNNING,
    seeds::seed_weights,
    Lloyd,
};
use crate::{error::Result, metric::Metric, primitives, ranks::Ranks, rows::Rows};
use candle_core::{DType, Device, Tensor};

/// The rows in each cluster of each problem.
pub(super) type Sizes = Vec<Vec<u64>>;

/// The same of the blocks so far, where they were counted, which makes nobody wait; f64 `(b, k)`.
pub(super) struct SizesSoFar(Tensor);

/// A row that may go to an empty cluster.
#[derive(Clone, Copy)]
struct Candidate {
    distance: f64,
    /// Its number among all rows of its problem.
    row: usize,
    label: u32,
}

/// The rows that move and the clusters that they go to, of each problem.
pub(super) type Relocations = Vec<Vec<(usize, u32)>>;

impl SizesSoFar {
    pub fn new([b, k]: [usize; 2], device: &Device) -> Result<Self> {
        Ok(Self(Tensor::zeros((b, k), DType::F64, device)?))
    }

    /// Adds the sizes of a block's clusters, u32 `(b, k)`.
    pub fn add(&mut self, of_block: &Tensor) -> Result<()> {
        self.0 = (&self.0 + of_block.to_dtype(DType::F64)?)?;
        Ok(())
    }

    /// The sizes of all ranks' clusters.
    pub fn gather(&self, ranks: &dyn Ranks) -> Result<Sizes> {
        let (b, k) = self.0.dims2()?;
        let mut all: Sizes = vec![vec![0; k]; b];
        for rank in ranks.gather(self.0.flatten_all()?.to_vec1()?)? {
            all.iter_mut().flatten().zip(rank).for_each(|(size, more)| *size += more as u64);
        }
        Ok(all)
    }
}

impl Lloyd<'_> {
    /// The problems that have not converged and have an empty cluster, if there are any.
    pub(super) fn lacking(&self, sizes: &Sizes) -> Result<Option<Vec<bool>>> {
        let stop = self.progress.stop.to_vec1::<u32>()?;
        let lacking: Vec<_> = sizes.iter().zip(stop).map(|(s, stop)| stop == RUNNING && s.contains(&0)).collect();
        Ok(lacking.contains(&true).then_some(lacking))
    }

    /// Which rows go to clusters that are empty: the farthest from their centroids, if they have a weight and leave no other
    /// cluster empty. Each block and rank names as many as all clusters could take.
    pub(super) fn relocations(&self, feed: &mut dyn Feed, mut sizes: Sizes, lacking: &[bool]) -> Result<Relocations> {
        let mut farthest: Vec<Vec<Candidate>> = vec![vec![]; sizes.len()];
        feed.for_each_block(&mut |block| self.add_candidates(block, lacking, &mut farthest))?;
        let mut all: Vec<Vec<Candidate>> = vec![vec![]; sizes.len()];
        for rank in feed.ranks().gather(encode(&farthest))? {
            decode(&rank, &mut all);
        }
        let of_problem = |(mut farthest, size): (Vec<Candidate>, &mut Vec<u64>)| {
            // Puts them in order.
            keep_farthest(&mut farthest, usize::MAX);
            let (mut farthest, mut relocations) = (farthest.into_iter(), vec![]);
            let empty: Vec<_> = (0..size.len()).filter(|&j| size[j] == 0).collect();
            for cluster in empty {
                // A cluster's last row would leave it empty.
                let Some(found) = farthest.find(|found| size[found.label as usize] > 1) else { break };
                size[found.label as usize] -= 1;
                size[cluster] += 1;
                relocations.push((found.row, cluster as u32));
            }
            relocations
        };
        Ok(all.into_iter().zip(&mut sizes).map(of_problem).collect())
    }

    /// Takes the rows of a block that may move to the farthest so far, of problems that lack some.
    fn add_candidates(&self, block: Block<'_>, lacking: &[bool], farthest: &mut [Vec<Candidate>]) -> Result<()> {
        let (x, metric) = (block.x, self.settings.metric);
        let distances =
            primitives::distances(x, &Rows::new(self.centroids)?, block.labels, metric)?.to_vec2::<f64>()?;
        let weights = seed_weights(x, block.weights, self.settings)?.map(|w| w.to_vec2::<f64>()).transpose()?;
        let labels = block.labels.to_vec2::<u32>()?;
        for (b, farthest) in farthest.iter_mut().enumerate().filter(|(b, _)| lacking[*b]) {
            // A row on its centroid has nowhere better to be, and one of no weight moves no centroid.
            let far = &distances[b];
            let movable = |&i: &usize| {
                let off_centroid = far[i] > 0.0 || metric == Metric::Dot && !far[i].is_nan();
                off_centroid && weights.as_ref().is_none_or(|weights| weights[b][i] > 0.0)
            };
            let candidate = |i| Candidate { distance: far[i], row: block.first + i, label: labels[b][i] };
            for candidate in (0..x.n).filter(movable).map(candidate) {
                // Of many rows few are kept at a time.
                if farthest.len() == 2 * self.settings.k {
                    keep_farthest(farthest, self.settings.k);
                }
                farthest.push(candidate);
            }
            keep_farthest(farthest, self.settings.k);
        }
        Ok(())
    }
}

/// Gives the rows of a block to the clusters that they go to.
pub(super) fn relocate(block: Block<'_>, relocations: &Relocations) -> Result<()> {
    let rows = block.first..block.first + block.x.n;
    if !relocations.iter().flatten().any(|(row, _)| rows.contains(row)) {
        return Ok(());
    }
    let mut labels = block.labels.to_vec2::<u32>()?;
    for (labels, relocations) in labels.iter_mut().zip(relocations) {
        for &(row, cluster) in relocations.iter().filter(|(row, _)| rows.contains(row)) {
            labels[row - rows.start] = cluster;
        }
    }
    let labels = Tensor::from_vec(labels.concat(), block.labels.shape(), block.labels.device())?;
    primitives::overwrite(block.labels, &labels)
}

/// Keeps the farthest `count` candidates, in order, the first rows of equals.
fn keep_farthest(candidates: &mut Vec<Candidate>, count: usize) {
    let farther = |a: &Candidate, b: &Candidate| b.distance.total_cmp(&a.distance).then(a.row.cmp(&b.row));
    candidates.sort_unstable_by(farther);
    candidates.truncate(count);
}

/// The candidates of each problem as numbers that ranks exchange: how many there are, and three for each.
fn encode(farthest: &[Vec<Candidate>]) -> Vec<f64> {
    let of_problem = |candidates: &Vec<Candidate>| {
        let each = candidates.iter().flat_map(|c| [c.distance, c.row as f64, f64::from(c.label)]);
        std::iter::once(candidates.len() as f64).chain(each).collect::<Vec<_>>()
    };
    farthest.iter().flat_map(of_problem).collect()
}

/// Adds the candidates of each problem that a rank has [encoded](encode) to those of others.
fn decode(mut numbers: &[f64], all: &mut [Vec<Candidate>]) {
    for candidates in all {
        let (count, rest) = numbers.split_at(1);
        let (mine, rest) = rest.split_at(3 * count[0] as usize);
        let each = mine.chunks_exact(3);
        candidates.extend(each.map(|c| Candidate { distance: c[0], row: c[1] as usize, label: c[2] as u32 }));
        numbers = rest;
    }
}
