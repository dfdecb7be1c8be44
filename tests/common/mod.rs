//! The suites share this: devices, seeded data, layouts, and comparison to the bit.
#![allow(dead_code)] // Every suite compiles this file and uses its own part of it.

pub mod naive;

use candle_core::{DType, Device, Tensor};
use candle_flash_kmeans::{Fit, Init, KMeans, Metric};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::{
    fs,
    path::{Path, PathBuf},
};

/// A matrix, row by row.
pub type Rows = Vec<Vec<f64>>;

pub const DTYPES: [DType; 4] = [DType::F16, DType::BF16, DType::F32, DType::F64];
pub const METRICS: [Metric; 4] = [Metric::SquaredEuclidean, Metric::Cosine, Metric::Dot, Metric::Manhattan];

/// Where a test runs: the CPU, and with `FLASH_KMEANS_TEST_DEVICE=cuda` the first GPU too. Asked for a GPU that is not
/// there, a test fails: one that skips itself proves nothing. One handle a thread: two handles of one GPU are different
/// devices to Candle, and each thread has its own stream.
pub fn devices() -> Vec<Device> {
    thread_local!(static DEVICES: Vec<Device> = open());
    DEVICES.with(Clone::clone)
}

/// Whether case `i` of many alike is for this device: on the CPU each is, on a GPU each third, since a fit in small blocks takes a
/// thousand launches there.
pub fn is_picked(device: &Device, i: usize) -> bool {
    device.is_cpu() || i.is_multiple_of(3)
}

fn open() -> Vec<Device> {
    let mut devices = vec![Device::Cpu];
    match std::env::var("FLASH_KMEANS_TEST_DEVICE").as_deref() {
        Ok("cuda") => {
            devices.push(Device::new_cuda(0).expect("FLASH_KMEANS_TEST_DEVICE=cuda needs a GPU and the feature `cuda`"))
        }
        Ok("cpu") | Err(_) => {}
        Ok(other) => panic!("FLASH_KMEANS_TEST_DEVICE={other} is neither cpu nor cuda"),
    }
    devices
}

/// A folder that goes away with the test, in memory where there is such a place: thousands of files need not wait for a disk, and what a
/// process leaves there when it is killed is what it would leave on one.
pub struct Folder(pub PathBuf);

impl Folder {
    pub fn new(name: &str) -> Self {
        let memory = Path::new("/dev/shm");
        let root = if memory.is_dir() { memory.to_path_buf() } else { std::env::temp_dir() };
        let path = root.join(format!("flash-kmeans-{}-{name}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    /// An empty folder within.
    pub fn emptied(&self, name: &str) -> PathBuf {
        let path = self.0.join(name);
        let _ = fs::remove_dir_all(&path);
        fs::create_dir(&path).unwrap();
        path
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

pub fn rng(seed: u64) -> ChaCha8Rng {
    ChaCha8Rng::seed_from_u64(seed)
}

/// A tensor on the CPU of the values `f` gives, one after another.
pub fn tensor(shape: &[usize], dtype: DType, mut f: impl FnMut(usize) -> f64) -> Tensor {
    let data: Vec<_> = (0..shape.iter().product()).map(&mut f).collect();
    Tensor::from_vec(data, shape, &Device::Cpu).unwrap().to_dtype(dtype).unwrap()
}

/// Values `offset + scale * u`, `u` uniform in [-1, 1).
pub fn uniform(shape: &[usize], offset: f64, scale: f64, dtype: DType, rng: &mut ChaCha8Rng) -> Tensor {
    tensor(shape, dtype, |_| offset + scale * rng.random_range(-1.0..1.0))
}

/// Centroids of which all but one are the same, far away: their clusters are empty.
pub fn crowded(x: &Tensor, k: usize) -> Tensor {
    let first = x.narrow(x.rank() - 2, 0, 1).unwrap();
    let away = first.ones_like().unwrap().affine(100.0, 0.0).unwrap();
    let all: Vec<_> = std::iter::once(&first).chain((1..k).map(|_| &away)).collect();
    Tensor::cat(&all, x.rank() - 2).unwrap()
}

/// Whole numbers of magnitude at most `limit`: with a small one, every sum and product is exact in every type.
pub fn integers(shape: &[usize], limit: i64, dtype: DType, rng: &mut ChaCha8Rng) -> Tensor {
    tensor(shape, dtype, |_| rng.random_range(-limit..=limit) as f64)
}

/// Rows around `centres` points spread five times as wide: what a fit is for, with few near-ties on the way.
pub fn blobs(shape: &[usize], centres: usize, dtype: DType, rng: &mut ChaCha8Rng) -> Tensor {
    let d = shape[shape.len() - 1];
    let centre: Vec<f64> = (0..centres * d).map(|_| 1.0 + rng.random_range(-8.0..8.0)).collect();
    let mut at = 0;
    tensor(shape, dtype, |i| {
        at = if i % d == 0 { rng.random_range(0..centres) } else { at };
        centre[at * d + i % d] + rng.random_range(-1.5..1.5)
    })
}

/// Ones on `device`. An empty tensor is a view, because Candle cannot allocate one of no bytes on a GPU.
pub fn ones(shape: &[usize], dtype: DType, device: &Device) -> Tensor {
    let stored: Vec<usize> = shape.iter().map(|&s| s.max(1)).collect();
    let mut t = Tensor::ones(stored, dtype, device).unwrap();
    for (dim, _) in shape.iter().enumerate().filter(|(_, s)| **s == 0) {
        t = t.narrow(dim, 0, 0).unwrap();
    }
    t
}

/// All elements in f64, exactly.
pub fn f64s(t: &Tensor) -> Vec<f64> {
    let t = t.to_device(&Device::Cpu).unwrap().contiguous().unwrap();
    t.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

pub fn u32s(t: &Tensor) -> Vec<u32> {
    assert!(matches!(t.dtype(), DType::U32 | DType::U8), "{:?}", t.dtype());
    f64s(t).into_iter().map(|v| v as u32).collect()
}

pub fn bits(t: &Tensor) -> Vec<u64> {
    f64s(t).into_iter().map(f64::to_bits).collect()
}

#[track_caller]
pub fn assert_same(a: &Tensor, b: &Tensor, what: &str) {
    assert_eq!((a.dims(), a.dtype()), (b.dims(), b.dtype()), "{what}");
    let differs = bits(a).iter().zip(bits(b)).position(|(a, b)| *a != b);
    if let Some(i) = differs {
        panic!("{what}: element {i} of {:?} is {:e} and {:e}", a.dims(), f64s(a)[i], f64s(b)[i]);
    }
}

#[track_caller]
pub fn assert_same_fit(a: &Fit, b: &Fit, what: &str) {
    assert_same(&a.labels, &b.labels, &format!("{what}: labels"));
    assert_same(&a.centroids, &b.centroids, &format!("{what}: centroids"));
    assert_same(&a.counts, &b.counts, &format!("{what}: counts"));
    assert_same(&a.inertia, &b.inertia, &format!("{what}: inertia"));
    assert_same(&a.n_iter, &b.n_iter, &format!("{what}: n_iter"));
    assert_same(&a.converged, &b.converged, &format!("{what}: converged"));
}

/// Fits on every device, demands the same bits of each and labels that belong to the centroids, and returns the CPU's.
#[track_caller]
pub fn fit(settings: &KMeans, x: &Tensor) -> Fit {
    fit_on(|_| settings.clone(), x)
}

/// The same from given centroids, which have to be where the rows are.
#[track_caller]
pub fn fit_from(start: &Tensor, settings: &KMeans, x: &Tensor) -> Fit {
    fit_on(|device| settings.clone().init(Init::Given(start.to_device(device).unwrap())), x)
}

#[track_caller]
fn fit_on(settings: impl Fn(&Device) -> KMeans, x: &Tensor) -> Fit {
    let mut first: Option<Fit> = None;
    for device in devices() {
        let x = x.to_device(&device).unwrap();
        let fit = settings(&device).fit(&x).unwrap();
        assert_eq!(u32s(&fit.labels), u32s(&fit.predict(&x).unwrap()), "labels of other centroids on {device:?}");
        let n = x.dims()[x.rank() - 2] as u32;
        let k = fit.counts.dims()[fit.counts.rank() - 1];
        u32s(&fit.counts).chunks(k).for_each(|c| assert_eq!(c.iter().sum::<u32>(), n));
        if let Some(first) = &first {
            assert_same_fit(first, &fit, "backends differ");
        }
        first.get_or_insert(fit);
    }
    first.unwrap()
}

/// The problems of a `(..batch, n, d)` tensor.
pub fn problems(t: &Tensor) -> Vec<Rows> {
    let (batch, n, d) = (t.dims()[..t.rank() - 2].iter().product(), t.dims()[t.rank() - 2], t.dims()[t.rank() - 1]);
    let v = f64s(t);
    (0..batch).map(|b| (0..n).map(|i| v[(b * n + i) * d..][..d].to_vec()).collect()).collect()
}

/// The labels, and each row's distance, that the specification gives; centroids without a batch serve every problem.
pub fn expected(x: &Tensor, c: &Tensor, metric: Metric) -> (Vec<u32>, Vec<f64>) {
    let (xs, cs) = (problems(x), problems(c));
    let (mut labels, mut distances) = (vec![], vec![]);
    for (b, x) in xs.iter().enumerate() {
        let c = &cs[if cs.len() == 1 { 0 } else { b }];
        let of_problem = naive::labels(x, c, metric);
        distances.extend(x.iter().zip(&of_problem).map(|(x, &l)| naive::distance(x, &c[l as usize], metric)));
        labels.extend(of_problem);
    }
    (labels, distances)
}

pub fn spec_labels(x: &Tensor, c: &Tensor, metric: Metric) -> Vec<u32> {
    expected(x, c, metric).0
}

/// Bits of the significand and exponent of the smallest normal number.
fn format(dtype: DType) -> (i32, i32) {
    match dtype {
        DType::F16 => (11, -14),
        DType::BF16 => (8, -126),
        DType::F32 => (24, -126),
        _ => (53, -1022),
    }
}

/// The spacing of `dtype` at `v`.
pub fn ulp(v: f64, dtype: DType) -> f64 {
    let (bits, smallest) = format(dtype);
    let exponent = ((v.to_bits() >> 52) & 0x7ff) as i32 - 1023;
    2f64.powi((exponent.max(smallest) - bits + 1).max(-1074))
}

/// `v` rounded to `dtype` once, to nearest even. (Candle and `half` may go through f32, and round twice.)
pub fn round(v: f64, dtype: DType) -> f64 {
    if dtype == DType::F64 {
        return v;
    }
    (v / ulp(v, dtype)).round_ties_even() * ulp(v, dtype)
}

/// A sum as good as rounded once: Neumaier's.
pub fn sum(terms: impl Iterator<Item = f64>) -> f64 {
    let (mut s, mut lost) = (0.0f64, 0.0);
    for t in terms {
        let next = s + t;
        lost += if s.abs() >= t.abs() { (s - next) + t } else { (t - next) + s };
        s = next;
    }
    s + lost
}

/// A tensor in a layout of its own, inside a buffer whose other elements are NaN.
pub struct Laid {
    pub name: String,
    pub base: Tensor,
    pub view: Tensor,
}

/// `t` (contiguous) in every layout that Candle makes of a dense tensor, all equal to it in value.
pub fn layouts(t: &Tensor) -> Vec<Laid> {
    let nan = |shape: &[usize]| tensor(shape, t.dtype(), |_| f64::NAN).to_device(t.device()).unwrap();
    let (dims, last) = (t.dims(), t.rank() - 1);
    let mut all = vec![];
    let mut add = |name: String, base: Tensor, view: Tensor| all.push(Laid { name, base, view });
    for dim in 0..=last {
        let mut shape = dims.to_vec();
        shape[dim] = 3;
        let base = Tensor::cat(&[&nan(&shape), t, &nan(&shape)], dim).unwrap().contiguous().unwrap();
        let view = base.narrow(dim, 3, dims[dim]).unwrap();
        add(format!("narrowed in dim {dim}"), base, view);
        let gaps = nan(dims).unsqueeze(dim + 1).unwrap();
        let base = Tensor::cat(&[&t.unsqueeze(dim + 1).unwrap(), &gaps], dim + 1).unwrap().contiguous().unwrap();
        let view = base.narrow(dim + 1, 0, 1).unwrap().squeeze(dim + 1).unwrap();
        add(format!("every second of dim {dim}"), base, view);
        for other in 0..dim {
            let base = t.transpose(other, dim).unwrap().contiguous().unwrap();
            let view = base.transpose(other, dim).unwrap();
            add(format!("dims {other} and {dim} swapped"), base, view);
        }
    }
    for shift in 1..=3 {
        let count = t.elem_count();
        let base = Tensor::cat(&[&nan(&[shift]), &t.flatten_all().unwrap(), &nan(&[5])], 0).unwrap();
        let view = base.narrow(0, shift, count).unwrap().reshape(dims).unwrap();
        add(format!("starting at element {shift}"), base, view);
    }
    all
}

/// A token that a query may read: its problem's key and value, and how many it stands for.
pub type Weighed = (Vec<f64>, Vec<f64>, f64);

/// Attention of a query to `read`, in f64.
pub fn attention(q: &[f64], read: &[Weighed], scale: f64) -> Vec<f64> {
    let scores: Vec<f64> = read.iter().map(|(k, _, n)| dot(q, k) * scale + n.ln()).collect();
    let peak = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = scores.iter().map(|s| (s - peak).exp()).collect();
    let total = sum(weights.iter().copied());
    (0..read[0].1.len()).map(|i| sum(read.iter().zip(&weights).map(|((_, v, _), w)| v[i] * w)) / total).collect()
}

pub fn dot(a: &[f64], b: &[f64]) -> f64 {
    sum(a.iter().zip(b).map(|(a, b)| a * b))
}

pub fn mean(rows: &[Vec<f64>], of: &[usize]) -> Vec<f64> {
    (0..rows[0].len()).map(|i| sum(of.iter().map(|&r| rows[r][i])) / of.len().max(1) as f64).collect()
}

/// The largest of some magnitudes, and NaN if one is NaN: `f64::max` drops it, and a test would pass.
pub fn largest(magnitudes: impl IntoIterator<Item = f64>) -> f64 {
    magnitudes.into_iter().fold(0.0, |largest, v| if largest.is_nan() || largest > v { largest } else { v })
}

/// Every element is within `tolerance` of what is expected; neither NaN nor an infinity is near anything, not even itself.
#[track_caller]
pub fn assert_near(got: &Tensor, expected: &[f64], tolerance: f64, what: &str) {
    let got = f64s(got);
    assert_eq!(got.len(), expected.len(), "{what}");
    let worst = largest(got.iter().zip(expected).map(|(a, b)| (a - b).abs()));
    assert!(worst <= tolerance, "{what}: {worst:e} off");
}
