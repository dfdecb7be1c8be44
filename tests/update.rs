//! The stable order and the means.

mod common;

use candle_core::{DType, Device, Tensor};
use candle_flash_kmeans::{cluster_means, sort_by_cluster};
use common::*;
use rand::{seq::SliceRandom, Rng};

fn random_labels(b: usize, n: usize, k: usize, rng: &mut impl Rng) -> Tensor {
    let labels: Vec<u32> = (0..b * n).map(|_| rng.random_range(0..k as u32)).collect();
    Tensor::from_vec(labels, (b, n), &Device::Cpu).unwrap()
}

#[test]
fn order_is_stable_and_offsets_bound_the_clusters() {
    let mut rng = rng(11);
    let shapes = [
        (1, 1, 1),
        (1, 5000, 1),
        (3, 257, 2),
        (2, 1000, 1000),
        (1, 100, 5000),
        (7, 33, 40),
        (1, 70_000, 3),
        (1, 9000, 4097),
    ];
    for device in devices() {
        for (b, n, k) in shapes {
            let labels = random_labels(b, n, k, &mut rng);
            let (order, offsets) = sort_by_cluster(&labels.to_device(&device).unwrap(), k).unwrap();
            assert_eq!((order.dims(), offsets.dims()), (&[b, n][..], &[b, k + 1][..]));
            let (order, offsets) = (order.to_vec2::<u32>().unwrap(), offsets.to_vec2::<u32>().unwrap());
            for (b, labels) in labels.to_vec2::<u32>().unwrap().iter().enumerate() {
                let mut want: Vec<u32> = (0..n as u32).collect();
                want.sort_by_key(|&i| labels[i as usize]);
                assert_eq!(order[b], want);
                let bound = |j: usize| labels.iter().filter(|&&l| (l as usize) < j).count() as u32;
                let sample = (0..=k).step_by(k.div_ceil(50)).chain([k]);
                sample.for_each(|j| assert_eq!(offsets[b][j], bound(j), "{b} {n} {k} {j}"));
            }
        }
        let none = ones(&[2, 0], DType::U32, &device);
        let (order, offsets) = sort_by_cluster(&none, 3).unwrap();
        assert_eq!((order.dims(), u32s(&offsets)), (&[2, 0][..], vec![0; 8]));
    }
}

/// A compensated sum (Neumaier 1974): as good as twice the precision.
fn sum(values: impl Iterator<Item = f64>) -> f64 {
    let (mut s, mut lost) = (0f64, 0f64);
    for v in values {
        let t = s + v;
        lost += if s.abs() >= v.abs() { (s - t) + v } else { (v - t) + s };
        s = t;
    }
    s + lost
}

/// Below it the steps of the dtype stay the same.
fn smallest_normal(dtype: DType) -> f64 {
    match dtype {
        DType::F16 => 2f64.powi(-14),
        DType::F64 => f64::MIN_POSITIVE,
        _ => 2f64.powi(-126),
    }
}

/// One rounding of the mean (and, in f64, those of the total and the quotient).
#[test]
fn means_are_rounded_once() {
    let mut rng = rng(12);
    for device in devices() {
        for dtype in DTYPES {
            for (b, n, k, d) in [
                (1, 1, 1, 1),
                (2, 700, 5, 33),
                (1, 5000, 300, 130),
                (3, 1000, 1, 3),
                (1, 40, 60, 17),
                (1, 30_000, 2, 2),
            ] {
                let x = uniform(&[b, n, d], 0.3, 1.0, dtype, &mut rng);
                let labels = random_labels(b, n, k, &mut rng);
                let means =
                    cluster_means(&x.to_device(&device).unwrap(), &labels.to_device(&device).unwrap(), k).unwrap();
                assert_eq!((means.dims(), means.dtype()), (&[b, k, d][..], dtype));
                let (x, means, labels) = (problems(&x), problems(&means), labels.to_vec2::<u32>().unwrap());
                for (b, j) in (0..b).flat_map(|b| (0..k).map(move |j| (b, j))) {
                    let members: Vec<_> = (0..n).filter(|&i| labels[b][i] == j as u32).map(|i| &x[b][i]).collect();
                    for c in 0..d {
                        let mean = sum(members.iter().map(|r| r[c])) / members.len().max(1) as f64;
                        let error = (means[b][j][c] - mean).abs();
                        assert!(
                            error
                                <= unit(dtype) * mean.abs().max(smallest_normal(dtype)) * 1.0001
                                    + f64::EPSILON * mean.abs(),
                            "{dtype:?} {error:e} of {mean} on {device:?}"
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn permuted_rows_have_the_same_bits() {
    let mut rng = rng(13);
    for device in devices() {
        for dtype in DTYPES {
            let (n, k, d) = (20_000, 7, 19);
            // Magnitudes over forty octaves: f64 sums would depend on their order.
            let x: Vec<f64> =
                (0..n * d).map(|_| rng.random_range(-1.0..1.0) * 2f64.powi(rng.random_range(-25..15))).collect();
            let labels: Vec<u32> = (0..n).map(|_| rng.random_range(0..k as u32)).collect();
            let mut order: Vec<u32> = (0..n as u32).collect();
            order.shuffle(&mut rng);
            let x = Tensor::from_vec(x, (n, d), &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
            let labels = Tensor::from_vec(labels, n, &Device::Cpu).unwrap();
            let order = Tensor::from_vec(order, n, &Device::Cpu).unwrap();
            let means = |x: &Tensor, l: &Tensor| {
                cluster_means(&x.to_device(&device).unwrap(), &l.to_device(&device).unwrap(), k).unwrap()
            };
            let want = means(&x, &labels);
            let got = means(&x.index_select(&order, 0).unwrap(), &labels.index_select(&order, 0).unwrap());
            assert_eq!(bits(&got), bits(&want), "{dtype:?} {device:?}");
            assert_eq!(bits(&cluster_means(&x, &labels, k).unwrap()), bits(&want), "{dtype:?}: backends differ");
        }
    }
}

#[test]
fn a_huge_row_leaves_other_clusters_alone() {
    for device in devices() {
        let x = Tensor::new(&[[1e12f32, -1e12], [0.1, 0.2], [0.3, 0.4], [1e-20, -1e-20]], &device).unwrap();
        let labels = Tensor::new(&[0u32, 1, 1, 2], &device).unwrap();
        let means = cluster_means(&x, &labels, 3).unwrap().to_vec2::<f32>().unwrap();
        let mean = |a: f32, b: f32| ((a as f64 + b as f64) / 2.0) as f32;
        assert_eq!(means[..2], [[1e12, -1e12], [mean(0.1, 0.3), mean(0.2, 0.4)]]);
        // Below the grid of sums this wide, by far less than the last bit of anything near the largest term.
        assert!(means[2][0].abs() <= 1e-19);
    }
}

#[test]
fn sums_beyond_the_dtype_do_not_overflow() {
    for device in devices() {
        for dtype in [DType::F16, DType::F32, DType::F64] {
            let largest = match dtype {
                DType::F16 => 65504.0,
                DType::F32 => f32::MAX as f64,
                // The total itself is an f64.
                _ => f64::MAX / 8192.0,
            };
            let x = Tensor::full(largest, (5000, 2), &device).unwrap().to_dtype(dtype).unwrap();
            let means = cluster_means(&x, &Tensor::zeros(5000, DType::U32, &device).unwrap(), 1).unwrap();
            for mean in f64s(&means) {
                // f64 has no wider type to divide in: the total and the quotient are rounded.
                let error = if dtype == DType::F64 { 2.0 * f64::EPSILON } else { 0.0 };
                assert!((mean / largest - 1.0).abs() <= error, "{mean} {dtype:?} on {device:?}");
            }
        }
    }
}
