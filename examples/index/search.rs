//! The neighbours of queries: exactly, and by the lists whose centroids are nearest.

use crate::{data, lists::Lists};
use anyhow::Result;
use candle_core::{DType, Tensor, D};
use candle_flash_kmeans::{nearest, Fit, Source};
use rayon::prelude::*;

/// Neighbours that are asked for.
pub const NEIGHBOURS: usize = 10;

/// The queries: rows of the source, evenly spaced, none of which is its own neighbour.
pub struct Queries {
    pub ids: Vec<u32>,
    /// f32 `(queries, d)`
    pub rows: Tensor,
}

impl Queries {
    pub fn new(source: &Source<'_>, count: usize) -> Result<Self> {
        let n = source.shape().0 as usize;
        let count = count.min(n);
        let ids: Vec<_> = (0..count).map(|i| i * n / count).collect();
        let rows = ids.iter().map(|&id| data::read(source, id..id + 1)).collect::<Result<Vec<_>>>()?;
        Ok(Self {
            ids: ids.into_iter().map(|id| id as u32).collect(),
            rows: Tensor::cat(&rows, 0)?.to_dtype(DType::F32)?,
        })
    }
}

/// The nearest rows of a query among those that it was offered, best first: their scores and their numbers.
#[derive(Clone, Default)]
pub struct Nearest(Vec<(f32, u32)>);

impl Nearest {
    fn offer(&mut self, score: f32, id: u32) {
        if self.0.len() == NEIGHBOURS && self.0[NEIGHBOURS - 1] <= (score, id) {
            return;
        }
        let at = self.0.partition_point(|other| *other < (score, id));
        self.0.insert(at, (score, id));
        self.0.truncate(NEIGHBOURS);
    }
}

/// Offers rows to queries, each but its own.
fn offer(queries: &Tensor, own: &[u32], rows: &Tensor, ids: &[u32], nearest: &mut [Nearest]) -> Result<()> {
    // Half the squared distance, less what all rows of a query have in common.
    let halves = (rows.sqr()?.sum(D::Minus1)? * 0.5)?;
    let scores = halves.broadcast_sub(&queries.matmul(&rows.t()?)?)?.flatten_all()?.to_vec1::<f32>()?;
    nearest.par_iter_mut().zip(own).zip(scores.par_chunks(ids.len())).for_each(|((nearest, own), scores)| {
        for (&score, &id) in scores.iter().zip(ids) {
            if id != *own {
                nearest.offer(score, id);
            }
        }
    });
    Ok(())
}

/// The neighbours among all rows of a source, in blocks that `memory` bytes have room for with the scores of all queries.
pub fn exact(source: &Source<'_>, queries: &Queries, memory: usize) -> Result<Vec<Nearest>> {
    let mut nearest = vec![Nearest::default(); queries.ids.len()];
    let (row_bytes, d) = (source.row_bytes(), source.shape().1);
    let of_row = row_bytes + (2 * d + 2 * queries.ids.len()) * size_of::<f32>();
    for block in data::blocks(source, memory / of_row * row_bytes) {
        let (rows, x) = block?;
        let ids: Vec<_> = rows.map(|row| row as u32).collect();
        offer(&queries.rows, &queries.ids, &x, &ids, &mut nearest)?;
    }
    Ok(nearest)
}

/// An answer of the index.
pub struct Found {
    pub nearest: Vec<Nearest>,
    /// Rows that were compared with a query, of all queries.
    pub compared: usize,
}

/// `nearest` finds so many at most.
const NEAREST: usize = 64;

/// The lists whose centroids are nearest to each query.
fn probes(fit: &Fit, queries: &Tensor, nprobe: usize) -> Result<Vec<Vec<u32>>> {
    let (queries, k) = (queries.to_dtype(fit.centroids.dtype())?, fit.centroids.dim(0)?);
    if nprobe <= NEAREST {
        return Ok(nearest(&queries, &fit.centroids, nprobe.min(k), fit.metric)?.0.to_vec2()?);
    }
    let distances = fit.transform(&queries)?.to_dtype(DType::F32)?.to_vec2::<f32>()?;
    let order = |distances: &Vec<f32>| {
        let mut order: Vec<_> = (0..k as u32).collect();
        order.sort_by(|&a, &b| distances[a as usize].total_cmp(&distances[b as usize]));
        order.truncate(nprobe);
        order
    };
    Ok(distances.iter().map(order).collect())
}

/// The neighbours in the `nprobe` lists whose centroids are nearest to each query. A list is read once for all queries that want it.
pub fn search(fit: &Fit, lists: &Lists, queries: &Queries, nprobe: usize) -> Result<Found> {
    let mut wanted_by = vec![vec![]; fit.centroids.dim(0)?];
    for (query, probes) in probes(fit, &queries.rows, nprobe)?.iter().enumerate() {
        probes.iter().for_each(|&list| wanted_by[list as usize].push(query));
    }
    let of_list = |(list, wanted_by): (usize, &Vec<usize>)| {
        let read = if wanted_by.is_empty() { None } else { lists.read(list)? };
        let Some((ids, rows)) = read else { return Ok((0, vec![])) };
        let at = Tensor::from_iter(wanted_by.iter().map(|&query| query as u32), rows.device())?;
        let own: Vec<_> = wanted_by.iter().map(|&query| queries.ids[query]).collect();
        let mut nearest = vec![Nearest::default(); own.len()];
        offer(&queries.rows.index_select(&at, 0)?, &own, &rows, &ids, &mut nearest)?;
        Ok((own.len() * ids.len(), nearest))
    };
    let found = wanted_by.par_iter().enumerate().map(of_list).collect::<Result<Vec<_>>>()?;
    let (mut nearest, mut compared) = (vec![Nearest::default(); queries.ids.len()], 0);
    for (wanted_by, (pairs, of_list)) in wanted_by.iter().zip(found) {
        compared += pairs;
        for (&query, Nearest(of_list)) in wanted_by.iter().zip(of_list) {
            of_list.into_iter().for_each(|(score, id)| nearest[query].offer(score, id));
        }
    }
    Ok(Found { nearest, compared })
}

/// The share of true neighbours that were found.
pub fn recall(found: &[Nearest], truth: &[Nearest]) -> f64 {
    let hits = |(found, truth): (&Nearest, &Nearest)| {
        truth.0.iter().filter(|(_, id)| found.0.iter().any(|(_, other)| other == id)).count()
    };
    let all: usize = truth.iter().map(|truth| truth.0.len()).sum();
    found.iter().zip(truth).map(hits).sum::<usize>() as f64 / all as f64
}
