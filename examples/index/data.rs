//! Rows to index: a file of a mixture of Gaussians, which drifts, and blocks of any source.

use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use candle_flash_kmeans::Source;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};
use std::{
    fs::File,
    io::{BufWriter, Write},
    ops::Range,
    path::Path,
};

/// Components of the mixture.
const TOPICS: usize = 128;
/// The deviation of their means; that of rows around a mean is 1.
const SPREAD: f32 = 3.0;
/// The deviation of a column as a share of that of the column before: real vectors, too, have fewer dimensions than columns.
const DECAY: f32 = 0.9;
/// The deviation of the vector by which drift shifts means.
const SHIFT: f32 = 6.0;
/// One row of so many is replaced as the data drift.
const REPLACED: usize = 5;

/// Rows of topics that come one after another, as in a log.
pub struct Mixture {
    pub rows: usize,
    pub columns: usize,
}

impl Mixture {
    /// The rows that drift replaces: the oldest.
    pub fn replaced(&self) -> Range<usize> {
        0..self.rows / REPLACED
    }

    /// Writes all rows as a `.fbin` file, a row at a time. Of a drifted mixture the oldest rows are new ones, around the means of their
    /// topics, all shifted by the same vector.
    pub fn write(&self, path: &Path, drifted: bool) -> Result<()> {
        let Self { rows, columns } = *self;
        let [mut means, mut shift, mut old, mut new] = [0, 1, 2, 3].map(ChaCha8Rng::seed_from_u64);
        let means = self.vectors(TOPICS, SPREAD, &mut means);
        let shift = self.vectors(1, SHIFT, &mut shift).remove(0);
        let mut file = BufWriter::new(File::create(path)?);
        for size in [rows, columns] {
            file.write_all(&u32::try_from(size)?.to_le_bytes())?;
        }
        for row in 0..rows {
            let topic = row * TOPICS / rows;
            let mut x = self.vectors(1, 1.0, &mut old).remove(0);
            if drifted && self.replaced().contains(&row) {
                x = self.vectors(1, 1.0, &mut new).remove(0);
                x.iter_mut().zip(&shift).for_each(|(x, shift)| *x += shift);
            }
            for (x, mean) in x.iter().zip(&means[topic]) {
                file.write_all(&(x + mean).to_le_bytes())?;
            }
        }
        Ok(file.flush()?)
    }

    /// Normal vectors of this deviation in the first column.
    fn vectors(&self, count: usize, deviation: f32, rng: &mut ChaCha8Rng) -> Vec<Vec<f32>> {
        let mut normal = || -> f32 { StandardNormal.sample(rng) };
        let mut vector = || (0..self.columns).map(|column| deviation * DECAY.powi(column as i32) * normal()).collect();
        (0..count).map(|_| vector()).collect()
    }
}

/// These rows of a source, in the type that it gives them.
pub fn read(source: &Source<'_>, rows: Range<usize>) -> Result<Tensor> {
    let mut bytes = vec![0; rows.len() * source.row_bytes()];
    source.read(rows.start as u64..rows.end as u64, &mut bytes)?;
    Ok(Tensor::from_raw_buffer(&bytes, source.dtype(), &[rows.len(), source.shape().1], &Device::Cpu)?)
}

/// All rows, block by block in f32, of so many bytes each as a source gives them.
pub fn blocks<'a>(source: &'a Source<'_>, bytes: usize) -> impl Iterator<Item = Result<(Range<usize>, Tensor)>> + 'a {
    let (n, size) = (source.shape().0 as usize, (bytes / source.row_bytes()).max(1));
    (0..n.div_ceil(size)).map(move |i| {
        let rows = i * size..n.min((i + 1) * size);
        Ok((rows.clone(), read(source, rows)?.to_dtype(DType::F32)?))
    })
}
