//! What the tests share. Every body runs on each of [`devices`].
#![allow(dead_code)]

pub mod naive;

use candle_core::{DType, Device, Tensor};
use candle_flash_kmeans::Metric;
use naive::Row;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

pub const METRICS: [Metric; 4] = [Metric::SquaredEuclidean, Metric::Cosine, Metric::Dot, Metric::Manhattan];
pub const DTYPES: [DType; 4] = [DType::F16, DType::BF16, DType::F32, DType::F64];

/// The CPU, and the GPU if `FLASH_KMEANS_TEST_DEVICE=cuda` asks for it: then its absence is a failure.
pub fn devices() -> Vec<Device> {
    let mut devices = vec![Device::Cpu];
    match std::env::var("FLASH_KMEANS_TEST_DEVICE").as_deref() {
        Ok("cuda") => {
            devices.push(Device::new_cuda(0).expect("FLASH_KMEANS_TEST_DEVICE=cuda needs a GPU and `--features cuda`"))
        }
        Ok("cpu") | Err(_) => {}
        Ok(other) => panic!("FLASH_KMEANS_TEST_DEVICE={other} is not cpu or cuda"),
    }
    devices
}

pub fn rng(seed: u64) -> ChaCha8Rng {
    ChaCha8Rng::seed_from_u64(seed)
}

/// `(shape)` values `offset + scale * u`, `u` uniform in [-1, 1), in `dtype` on the CPU.
pub fn uniform(shape: &[usize], offset: f64, scale: f64, dtype: DType, rng: &mut ChaCha8Rng) -> Tensor {
    let values: Vec<f64> = (0..shape.iter().product()).map(|_| offset + scale * rng.random_range(-1.0..1.0)).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap().to_dtype(dtype).unwrap()
}

/// `(shape)` integers in `-largest..=largest`.
pub fn integers(shape: &[usize], largest: i64, dtype: DType, rng: &mut ChaCha8Rng) -> Tensor {
    let values: Vec<f64> = (0..shape.iter().product()).map(|_| rng.random_range(-largest..=largest) as f64).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap().to_dtype(dtype).unwrap()
}

/// The stored values of each problem's rows, in f64.
pub fn problems(t: &Tensor) -> Vec<Vec<Row>> {
    let t = t.to_device(&Device::Cpu).unwrap().to_dtype(DType::F64).unwrap();
    let (n, d) = (t.dims()[t.rank() - 2], t.dims()[t.rank() - 1]);
    t.reshape(((), n, d)).unwrap().to_vec3().unwrap()
}

/// Labels by the specification; centroids without a batch serve every problem.
pub fn spec_labels(x: &Tensor, c: &Tensor, metric: Metric) -> Vec<u32> {
    let (x, c) = (problems(x), problems(c));
    let of = |b: usize| &c[if c.len() == 1 { 0 } else { b }];
    x.iter().enumerate().flat_map(|(b, rows)| rows.iter().map(move |r| naive::label(r, of(b), metric))).collect()
}

pub fn u32s(t: &Tensor) -> Vec<u32> {
    t.flatten_all().unwrap().to_vec1().unwrap()
}

pub fn f64s(t: &Tensor) -> Vec<f64> {
    t.to_device(&Device::Cpu).unwrap().to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// Widening keeps every bit, so equal here is equal there.
pub fn bits(t: &Tensor) -> Vec<u64> {
    f64s(t).into_iter().map(f64::to_bits).collect()
}

/// Half a unit in the last place of `dtype`, relative.
pub fn unit(dtype: DType) -> f64 {
    match dtype {
        DType::F16 => 2f64.powi(-11),
        DType::BF16 => 2f64.powi(-8),
        DType::F32 => 2f64.powi(-24),
        _ => 2f64.powi(-53),
    }
}

/// Ones, of any shape on any device: a view where there is nothing to fill, which Candle's CUDA kernels refuse to launch for.
pub fn ones(shape: &[usize], dtype: DType, device: &Device) -> Tensor {
    let room: Vec<usize> = shape.iter().map(|&s| s.max(1)).collect();
    let whole = Tensor::ones(room, dtype, device).unwrap();
    shape.iter().enumerate().fold(whole, |t, (i, &s)| t.narrow(i, 0, s).unwrap())
}
