//! The rows of a case, and what is done to its centroids.

use super::{npy, Args, Op, Start};
use anyhow::{bail, ensure, Context, Result};
use candle_core::{safetensors, DType, Device, Tensor};
use clap::ValueEnum;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rand_distr::StandardNormal;
use rayon::prelude::*;
use std::{
    fmt,
    path::{Path, PathBuf},
    str::FromStr,
};

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Pattern {
    /// standard normal values
    Normal,
    /// 64 clusters whose centres are 10 apart in each column
    Blobs,
    /// 64 clusters around 20
    Offset,
    /// 32 small clusters 1,000 from the origin
    Tight,
    /// 16 different rows
    Duplicates,
    /// all rows equal
    Equal,
    /// normal, with one centroid of an assignment, or the last row of anything else, --factor times farther out
    Outlier,
    /// normal, with a centroid of NaN, for an assignment
    NanCentroid,
    /// normal, with an infinite centroid, for an assignment
    InfCentroid,
    /// normal, with each centroid twice, for an assignment or a fit from given centroids
    DuplicateCentroids,
}

/// Where the rows of a case come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    Pattern(Pattern),
    File(PathBuf),
}

impl FromStr for Source {
    type Err = anyhow::Error;

    fn from_str(name: &str) -> Result<Self> {
        if let Ok(pattern) = Pattern::from_str(name, false) {
            return Ok(Self::Pattern(pattern));
        }
        let known = Pattern::value_variants().iter().map(super::name).collect::<Vec<_>>().join(", ");
        match Path::new(name).extension().and_then(|extension| extension.to_str()) {
            Some("npy" | "safetensors") => Ok(Self::File(name.into())),
            _ => bail!("it is neither a .npy or .safetensors file nor one of {known}"),
        }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::Pattern(pattern) => f.write_str(&super::name(pattern)),
            Self::File(path) => write!(f, "{}", path.display()),
        }
    }
}

/// The option's help, with a line for each pattern.
pub fn help() -> String {
    let values = Pattern::value_variants().iter().filter_map(ValueEnum::to_possible_value);
    let lines = values.map(|v| format!("\n  {:20}{}", v.get_name(), v.get_help().cloned().unwrap_or_default()));
    let files = "a .npy or .safetensors file, whose shape replaces --b, --n and --d";
    format!("One or more, each a case of its own: {files}, or{}", lines.collect::<String>())
}

impl Source {
    /// `(b, n, d)`.
    pub fn rows(&self, args: &Args, dtype: DType, device: &Device) -> Result<Tensor> {
        let x = match self {
            Self::Pattern(pattern) => pattern.rows(args, dtype, device)?,
            Self::File(path) => {
                let x = read(path)?;
                let (n, d) = (x.dims()[x.rank() - 2], x.dims()[x.rank() - 1]);
                ensure!(x.elem_count() > 0, "{} holds an array of shape {:?}: it is empty", path.display(), x.dims());
                x.reshape(((), n, d))?.to_dtype(dtype)?.to_device(device)?
            }
        };
        let n = x.dim(1)?;
        ensure!(args.k <= n, "--k {} is outside 1..={n}, the rows of a problem", args.k);
        if let (Self::Pattern(Pattern::Outlier), false) = (self, args.op.compares()) {
            x.slice_set(&farther(&x.narrow(1, n - 1, 1)?, args.factor)?, 1, n - 1)?;
        }
        Ok(x)
    }

    /// The centroids `(b, k, d)` of a case whose rows gave these.
    pub fn centroids(&self, args: &Args, centroids: Tensor) -> Result<Tensor> {
        let Self::Pattern(pattern) = self else { return Ok(centroids) };
        let k = args.k;
        let replaced = |change: &dyn Fn(&Tensor) -> Result<Tensor>| {
            centroids.slice_set(&change(&centroids.narrow(1, k / 2, 1)?)?, 1, k / 2)?;
            Ok(centroids.clone())
        };
        let full = |value: f64| replaced(&|row: &Tensor| Ok(((row * 0.0)? + value)?));
        let given = args.op.fits() && args.init == Start::Given;
        match (pattern, args.op) {
            (Pattern::Outlier, op) if op.compares() => replaced(&|row| farther(row, args.factor)),
            (Pattern::NanCentroid, Op::Assign | Op::Nearest) => full(f64::NAN),
            (Pattern::InfCentroid, Op::Assign | Op::Nearest) => full(f64::INFINITY),
            (Pattern::NanCentroid | Pattern::InfCentroid, _) => {
                bail!("--data {self} is for assign and nearest: no fit has such a centroid")
            }
            (Pattern::DuplicateCentroids, op) if op.compares() || given => {
                let halves = Tensor::from_iter((0..k as u32).map(|j| j / 2), centroids.device())?;
                Ok(centroids.index_select(&halves, 1)?)
            }
            (Pattern::DuplicateCentroids, _) => {
                bail!("--data {self} is for what compares rows with centroids, and for fits with --init given")
            }
            _ => Ok(centroids),
        }
    }
}

fn farther(row: &Tensor, factor: f64) -> Result<Tensor> {
    let far = (row * factor)?;
    let largest = far.to_dtype(DType::F64)?.abs()?.max_all()?.to_scalar::<f64>()?;
    ensure!(largest.is_finite(), "--factor {factor} leaves the range of {}", row.dtype().as_str());
    Ok(far)
}

/// A tensor of at least two dimensions.
fn read(path: &Path) -> Result<Tensor> {
    if path.extension().is_some_and(|extension| extension == "npy") {
        return npy::read(path);
    }
    let tensors = safetensors::load(path, &Device::Cpu).with_context(|| format!("cannot read {}", path.display()))?;
    let first = tensors.into_iter().filter(|(_, t)| t.rank() >= 2).min_by(|a, b| a.0.cmp(&b.0));
    Ok(first.with_context(|| format!("{} has no tensor of two dimensions", path.display()))?.1)
}

impl Pattern {
    fn rows(self, args: &Args, dtype: DType, device: &Device) -> Result<Tensor> {
        let (b, n, d) = (args.b, args.n, args.d);
        let elements = b.checked_mul(n).and_then(|rows| rows.checked_mul(d));
        let elements = elements.with_context(|| format!("--b {b} --n {n} --d {d}: too many elements"))?;
        let (centres, offset, apart, spread) = match self {
            Self::Blobs => (64, 0.0, 10.0, 1.0),
            Self::Offset => (64, 20.0, 1.0, 1.0),
            Self::Tight => (32, 1000.0, 100.0, 0.01),
            Self::Duplicates => (16.min(n), 3.0, 1.0, 0.0),
            Self::Equal => (1, 3.0, 1.0, 0.0),
            _ => (1, 0.0, 0.0, 1.0),
        };
        // More normal numbers than a CPU should draw.
        if apart == 0.0 && device.is_cuda() && elements >= 1 << 28 {
            return normal_on_gpu(args, dtype, device);
        }
        let mut rng = ChaCha8Rng::seed_from_u64(args.seed);
        let centres: Vec<f32> =
            (0..centres * d).map(|_| offset + apart * rng.sample::<f32, _>(StandardNormal)).collect();
        let mut rows = Vec::new();
        rows.try_reserve_exact(elements).with_context(|| format!("--b {b} --n {n} --d {d}"))?;
        rows.resize(elements, 0f32);
        rows.par_chunks_mut(d * 1024).enumerate().for_each(|(i, rows)| {
            let mut rng = ChaCha8Rng::seed_from_u64(args.seed);
            rng.set_stream(i as u64 + 1);
            for row in rows.chunks_mut(d) {
                let centre = rng.random_range(0..centres.len() / d);
                for (v, c) in row.iter_mut().zip(&centres[centre * d..]) {
                    *v = c + spread * rng.sample::<f32, _>(StandardNormal);
                }
            }
        });
        Ok(Tensor::from_vec(rows, (b, n, d), &Device::Cpu)?.to_dtype(dtype)?.to_device(device)?)
    }
}

fn normal_on_gpu(args: &Args, dtype: DType, device: &Device) -> Result<Tensor> {
    let (b, n, d) = (args.b, args.n, args.d);
    device.set_seed(args.seed)?;
    let x = Tensor::zeros((b, n, d), dtype, device)?;
    let (all, part) = (x.reshape((b * n, d))?, ((1 << 26) / d).max(1));
    for first in (0..b * n).step_by(part) {
        let rows = part.min(b * n - first);
        all.slice_set(&Tensor::randn(0f32, 1.0, (rows, d), device)?.to_dtype(dtype)?, 0, first)?;
    }
    Ok(x)
}
