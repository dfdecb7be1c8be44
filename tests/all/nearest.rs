//! The nearest centroids of each row: the first of all by the definition, on any rows and centroids.

use super::kv_cache::refused;
use crate::common::*;
use candle_core::{DType, Device, Tensor};
use candle_flash_kmeans::{assign, nearest, Metric};
use rand::Rng;

/// All centroids of each row by distance and then by index, a NaN as far as can be: the first `m`.
fn specified(x: &Tensor, c: &Tensor, m: usize, metric: Metric) -> (Vec<u32>, Vec<u64>) {
    let (xs, cs) = (problems(x), problems(c));
    let (mut indices, mut distances) = (vec![], vec![]);
    for (b, x) in xs.iter().enumerate() {
        let c = &cs[if cs.len() == 1 { 0 } else { b }];
        for row in x {
            let distance = |c: &Vec<f64>| match naive::distance(row, c, metric) {
                d if d.is_nan() => f64::INFINITY,
                d => d,
            };
            let mut all: Vec<(f64, u32)> = c.iter().map(distance).zip(0..).collect();
            all.sort_by(|a, b| a.partial_cmp(b).unwrap());
            indices.extend(all[..m].iter().map(|found| found.1));
            distances.extend(all[..m].iter().map(|found| (found.0 + 0.0).to_bits()));
        }
    }
    (indices, distances)
}

#[track_caller]
fn check(x: &Tensor, c: &Tensor, m: usize, metric: Metric, what: &str) {
    let (indices, distances) = specified(x, c, m, metric);
    for device in devices() {
        let (x, c) = (x.to_device(&device).unwrap(), c.to_device(&device).unwrap());
        let (got, far) = nearest(&x, &c, m, metric).unwrap();
        let shape = [&x.dims()[..x.rank() - 1], &[m]].concat();
        assert_eq!((got.dims(), far.dims()), (&shape[..], &shape[..]));
        assert_eq!((got.dtype(), far.dtype()), (DType::U32, DType::F64));
        let far: Vec<u64> = f64s(&far).into_iter().map(|d| (d + 0.0).to_bits()).collect();
        let what = format!("{what}, {metric:?}, {:?}, {m} of {:?} on {device:?}", x.dtype(), c.dims());
        assert_eq!(u32s(&got), indices, "{what}");
        assert_eq!(far, distances, "{what}");
        let labels = assign(&x, &c, metric).unwrap();
        assert_eq!(u32s(&got.narrow(got.rank() - 1, 0, 1).unwrap()), u32s(&labels), "{what}");
    }
}

#[test]
fn the_nearest_are_the_first_of_all() {
    let mut rng = rng(61);
    for dtype in [DType::F16, DType::BF16, DType::F32, DType::F64] {
        for (n, k, d, m) in [(70, 9, 5, 9), (300, 64, 33, 64), (40, 700, 16, 10), (3, 1, 2, 1), (20, 1300, 3, 33)] {
            let x = blobs(&[2, n, d], 6, dtype, &mut rng);
            let c = blobs(&[2, k, d], 6, dtype, &mut rng);
            for metric in METRICS {
                check(&x, &c, m, metric, "blobs");
                check(&x, &c.get(0).unwrap(), m.min(3), metric, "the same centroids for all");
            }
        }
    }
}

/// Ties by the hundred, centroids that are there several times, and scales at which scores prove nothing.
#[test]
fn the_nearest_are_exact_where_scores_are_not() {
    let mut rng = rng(62);
    for metric in METRICS {
        for dtype in [DType::F16, DType::F32, DType::F64] {
            let whole = |shape: &[usize], rng: &mut _| integers(shape, 2, dtype, rng);
            check(&whole(&[1, 60, 4], &mut rng), &whole(&[1, 500, 4], &mut rng), 50, metric, "whole numbers");
            let one = Tensor::ones((1, 400, 3), dtype, &Device::Cpu).unwrap();
            check(&whole(&[1, 20, 3], &mut rng), &one, 64, metric, "one centroid");
            let (x, c) =
                (uniform(&[1, 50, 8], 1.0, 1e-3, dtype, &mut rng), uniform(&[1, 90, 8], 1.0, 1e-3, dtype, &mut rng));
            check(&x, &c, 12, metric, "far from 0");
        }
        for (dtype, scale) in [(DType::F32, 1e25), (DType::F32, 1e-25), (DType::F64, 1e200), (DType::F64, 1e-200)] {
            let (x, c) =
                (uniform(&[1, 40, 5], 0.0, scale, dtype, &mut rng), uniform(&[1, 70, 5], 0.0, scale, dtype, &mut rng));
            check(&x, &c, 7, metric, "extreme");
        }
        // Centroids of all sizes, some of which no score holds.
        let sizes: Vec<f64> = (0..80).map(|_| 10f64.powi(rng.random_range(-20..38))).collect();
        let c = tensor(&[1, 80, 4], DType::F32, |i| sizes[i / 4] * rng.random_range(-1.0..1.0));
        let x = tensor(&[1, 80, 4], DType::F32, |i| sizes[(i / 4 * 7) % 80] * rng.random_range(-1.0..1.0));
        check(&x, &c, 40, metric, "of all sizes");
        check(&x, &c, 64, metric, "of all sizes");
    }
}

/// NaN and infinities are as far as can be, on either side, and rows and centroids of zeros count.
#[test]
fn what_is_not_finite_comes_last() {
    let mut rng = rng(63);
    let odd = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 0.0];
    for dtype in [DType::F16, DType::F32, DType::F64] {
        let mut with = |n: usize, every: usize| {
            let values = f64s(&uniform(&[n, 4], 0.0, 1.0, dtype, &mut rng));
            tensor(&[1, n, 4], dtype, |i| match i / 4 % every {
                0 => odd[i / 4 / every % 4],
                1 if i % 4 == 2 => odd[i / 4 / every % 4],
                _ => values[i],
            })
        };
        let (x, c) = (with(60, 3), with(40, 5));
        for metric in METRICS {
            for m in [1, 5, 20, 40] {
                check(&x, &c, m, metric, "odd values");
            }
        }
    }
}

/// Views, and nothing at all.
#[test]
fn layouts_and_empty_rows() {
    let mut rng = rng(64);
    let (x, c) =
        (uniform(&[2, 9, 6], 0.0, 1.0, DType::F32, &mut rng), uniform(&[2, 7, 6], 0.0, 1.0, DType::F32, &mut rng));
    for device in devices() {
        let (x, c) = (x.to_device(&device).unwrap(), c.to_device(&device).unwrap());
        let (indices, distances) = nearest(&x, &c, 3, Metric::Cosine).unwrap();
        for of_x in layouts(&x) {
            for of_c in layouts(&c).into_iter().take(4) {
                let (got, far) = nearest(&of_x.view, &of_c.view, 3, Metric::Cosine).unwrap();
                assert_same(&got, &indices, &of_x.name);
                assert_same(&far, &distances, &of_c.name);
            }
        }
        let none = ones(&[2, 0, 6], DType::F32, &device);
        let (indices, distances) = nearest(&none, &c, 3, Metric::Dot).unwrap();
        assert_eq!((indices.dims(), distances.dims()), (&[2, 0, 3][..], &[2, 0, 3][..]));
    }
}

#[test]
fn refusals() {
    for device in devices() {
        let ones = |shape: &[usize], dtype| ones(shape, dtype, &device);
        let (x, c) = (ones(&[5, 3], DType::F32), ones(&[70, 3], DType::F32));
        let by = Metric::SquaredEuclidean;
        refused(nearest(&x, &c, 0, by), "Range", &["m", "0", "1..=64"]);
        refused(nearest(&x, &c, 65, by), "Range", &["m", "65", "1..=64"]);
        refused(nearest(&x, &c.narrow(0, 0, 4).unwrap(), 5, by), "Range", &["m", "5", "1..=4"]);
        refused(nearest(&x, &ones(&[7, 2], DType::F32), 1, by), "Size", &["centroids"]);
        refused(nearest(&x, &ones(&[7, 3], DType::F64), 1, by), "DType", &["centroids"]);
        refused(nearest(&ones(&[3], DType::F32), &c, 1, by), "Rank", &["x"]);
    }
}
