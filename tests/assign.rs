//! Labels are the f64 argmin, whatever the shape, dtype, metric, layout or magnitude.

mod common;

use candle_core::{DType, Device, Tensor};
use candle_flash_kmeans::{assign, assign_with_distances, quantize, Metric};
use common::*;
use rand::{seq::IndexedRandom, Rng};

/// `assign` equals the specification on every device.
#[track_caller]
fn check(x: &Tensor, c: &Tensor, metric: Metric, devices: &[Device], what: &str) {
    let want = spec_labels(x, c, metric);
    for device in devices {
        let (x, c) = (x.to_device(device).unwrap(), c.to_device(device).unwrap());
        let got = u32s(&assign(&x, &c, metric).unwrap());
        let wrong = got.iter().zip(&want).filter(|(g, w)| g != w).count();
        assert_eq!(
            wrong,
            0,
            "{what}: {wrong} of {} on {device:?}, {:?} {:?} {metric:?}",
            want.len(),
            x.shape(),
            c.shape()
        );
    }
}

const D: [usize; 35] = [
    1, 2, 3, 4, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 96, 100, 127, 128, 129, 192, 255, 256, 257, 384, 511, 512,
    513, 768, 1000, 1024, 1536, 2048, 2049, 4096,
];
const N: [usize; 19] = [1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 1000, 4095, 4096, 4097, 8193];
const K: [usize; 24] =
    [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 1000, 1031, 4097];

#[test]
fn shapes() {
    let (devices, mut rng) = (devices(), rng(1));
    for case in 0..560 {
        // Every D with every dtype and metric; N, K and batch at random, within what the specification can afford.
        let (d, dtype, metric) = (D[case % 35], DTYPES[case / 35 % 4], METRICS[case / 140]);
        let (b, n, k) = loop {
            let (b, n, k) =
                ([1, 2, 3, 17].choose(&mut rng).unwrap(), N.choose(&mut rng).unwrap(), K.choose(&mut rng).unwrap());
            if b * n * k * d <= 1 << 22 || n * k <= 64 {
                break (*b, *n, *k);
            }
        };
        let x = uniform(&[b, n, d], 0.0, 2.0, dtype, &mut rng);
        let batch = if case % 3 == 0 { vec![k, d] } else { vec![b, k, d] };
        let c = uniform(&batch, 0.0, 2.0, dtype, &mut rng);
        check(&x, &c, metric, &devices, "shapes");
    }
}

#[test]
fn ties_go_to_the_lowest_index() {
    let (devices, mut rng) = (devices(), rng(2));
    for case in 0..160 {
        let (dtype, metric) = (DTYPES[case % 4], METRICS[case / 4 % 4]);
        let (n, k, d) =
            (rng.random_range(1..400), rng.random_range(1..300), *[1, 2, 3, 16, 33, 70].choose(&mut rng).unwrap());
        // Few values, so that many distances are equal, and all arithmetic on them is exact.
        let x = integers(&[n, d], if case % 2 == 0 { 1 } else { 3 }, dtype, &mut rng);
        let c = integers(&[k, d], 1, dtype, &mut rng);
        check(&x, &c, metric, &devices, "few values");
        let twice = Tensor::cat(&[&c, &c, &c.neg().unwrap()], 0).unwrap();
        check(&x, &twice, metric, &devices, "duplicated");
        check(&x, &c.narrow(0, 0, 1).unwrap().broadcast_as((k, d)).unwrap(), metric, &devices, "one centroid");
        check(&x.narrow(0, 0, 1).unwrap().broadcast_as((n, d)).unwrap(), &c, metric, &devices, "one row");
    }
    let zeros = Tensor::new(&[[0f32, -0.0], [-0.0, 0.0]], &Device::Cpu).unwrap();
    METRICS.iter().for_each(|&m| check(&zeros, &zeros, m, &devices, "signed zeros"));
}

#[test]
fn far_from_the_origin() {
    let (devices, mut rng) = (devices(), rng(3));
    for power in [0, 4, 8, 12, 16] {
        for (metric, dtype) in METRICS.into_iter().flat_map(|m| DTYPES.map(|t| (m, t))) {
            let offset = 2f64.powi(power);
            if dtype == DType::F16 && power == 16 {
                continue;
            }
            for scale in [1.0, 0.01] {
                let x = uniform(&[300, 64], offset, scale, dtype, &mut rng);
                let c = uniform(&[100, 64], offset, scale, dtype, &mut rng);
                check(&x, &c, metric, &devices, "offset");
            }
        }
    }
}

/// No one shift helps here: 32 blobs 100 apart, and in each 8 centroids within 0.01 of each other.
#[test]
fn tight_clusters_in_far_blobs() {
    let (devices, mut rng) = (devices(), rng(4));
    let blobs = uniform(&[32, 1, 64], 0.0, 100.0, DType::F64, &mut rng);
    for (metric, dtype) in METRICS.into_iter().flat_map(|m| DTYPES.map(|t| (m, t))) {
        let near = |n: usize, rng: &mut _| {
            let spread = uniform(&[32, n, 64], 0.0, 0.01, DType::F64, rng);
            blobs.broadcast_add(&spread).unwrap().reshape((32 * n, 64)).unwrap().to_dtype(dtype).unwrap()
        };
        check(&near(12, &mut rng), &near(8, &mut rng), metric, &devices, "tight");
    }
}

#[test]
fn every_magnitude() {
    let (devices, mut rng) = (devices(), rng(5));
    for dtype in [DType::BF16, DType::F32, DType::F64] {
        for power in [-149, -140, -126, -100, -75, -60, -30, 0, 30, 60, 63, 64, 100, 126] {
            let x = uniform(&[70, 20], 0.0, 2f64.powi(power), dtype, &mut rng);
            let c = uniform(&[40, 20], 0.0, 2f64.powi(power), dtype, &mut rng);
            METRICS.iter().for_each(|&m| check(&x, &c, m, &devices, "scaled"));
            let mixed = Tensor::cat(&[&c, &uniform(&[3, 20], 0.0, 1.0, dtype, &mut rng)], 0).unwrap();
            METRICS.iter().for_each(|&m| check(&x, &mixed, m, &devices, "one large magnitude among others"));
        }
    }
    let large = uniform(&[50, 40], 0.0, 65000.0, DType::F16, &mut rng);
    let tiny = uniform(&[50, 40], 0.0, 1e-6, DType::F16, &mut rng);
    for metric in METRICS {
        check(&large, &large.narrow(0, 5, 30).unwrap(), metric, &devices, "near the largest f16");
        check(&tiny, &tiny.narrow(0, 5, 30).unwrap(), metric, &devices, "subnormal f16");
        check(&tiny, &Tensor::cat(&[&tiny, &large], 0).unwrap(), metric, &devices, "both");
    }
}

/// Any view gives the labels of its contiguous copy.
#[test]
fn layouts() {
    let mut rng = rng(6);
    for (device, dtype) in devices().iter().flat_map(|d| DTYPES.map(|t| (d.clone(), t))) {
        let base = uniform(&[3, 4, 60, 40], 0.0, 1.0, dtype, &mut rng).to_device(&device).unwrap();
        let flat = base.flatten_all().unwrap();
        let shifted = |by: usize| flat.narrow(0, by, 2 * 30 * 20).unwrap().reshape((2, 30, 20)).unwrap();
        let views: Vec<(&str, Tensor)> = vec![
            ("rows narrowed", base.narrow(2, 7, 31).unwrap()),
            ("columns narrowed", base.narrow(3, 3, 33).unwrap()),
            ("batch narrowed", base.narrow(0, 1, 2).unwrap()),
            ("inner batch narrowed", base.narrow(1, 1, 2).unwrap()),
            ("columns strided", base.transpose(2, 3).unwrap()),
            ("(b, s, h, d) as (b, h, s, d)", base.transpose(1, 2).unwrap()),
            ("batch permuted", base.permute((1, 0, 2, 3)).unwrap()),
            ("batch broadcast", base.narrow(0, 0, 1).unwrap().broadcast_as((5, 4, 60, 40)).unwrap()),
            ("rows broadcast", base.narrow(2, 4, 1).unwrap().broadcast_as((3, 4, 60, 40)).unwrap()),
            ("one element off", shifted(1)),
            ("two elements off", shifted(2)),
            ("three elements off", shifted(3)),
            ("one column", base.narrow(3, 5, 1).unwrap()),
        ];
        for (what, view) in views {
            let copy = view.force_contiguous().unwrap();
            let before = bits(&base);
            for metric in METRICS {
                let c = view.narrow(view.rank() - 2, 0, 4).unwrap();
                let c_copy = c.force_contiguous().unwrap();
                let want = assign_with_distances(&copy, &c_copy, metric).unwrap();
                for (x, c) in [(&view, &c_copy), (&copy, &c), (&view, &c)] {
                    let got = assign_with_distances(x, c, metric).unwrap();
                    assert_eq!(u32s(&got.0), u32s(&want.0), "{what} {dtype:?} {metric:?} {device:?}");
                    assert_eq!(bits(&got.1), bits(&want.1), "{what} {dtype:?} {metric:?} {device:?}");
                }
                assert_eq!(u32s(&want.0), spec_labels(&copy, &c_copy, metric), "{what} {dtype:?} {metric:?}");
            }
            assert_eq!(bits(&base), before, "{what}: the input was written");
        }
    }
}

/// Operands inside a larger buffer of NaN: reading one element too far would show, writing would too.
#[test]
fn red_zones() {
    let mut rng = rng(7);
    for (device, dtype) in devices().iter().flat_map(|d| DTYPES.map(|t| (d.clone(), t))) {
        for (n, k, d) in [(1, 1, 1), (63, 5, 17), (65, 64, 33), (257, 65, 64), (130, 129, 100)] {
            let zone = |rows: usize, rng: &mut _| {
                let inner = uniform(&[rows, d], 0.0, 1.0, dtype, rng).to_device(&device).unwrap();
                let nan = Tensor::full(f32::NAN, (80, d), &device).unwrap().to_dtype(dtype).unwrap();
                let whole = Tensor::cat(&[&nan, &inner, &nan], 0).unwrap();
                (inner, whole.narrow(0, 80, rows).unwrap(), whole)
            };
            let ((x, x_in, x_whole), (c, c_in, c_whole)) = (zone(n, &mut rng), zone(k, &mut rng));
            let before = (bits(&x_whole), bits(&c_whole));
            for metric in METRICS {
                let (want, got) = (quantize(&x, &c, metric).unwrap(), quantize(&x_in, &c_in, metric).unwrap());
                assert_eq!(u32s(&got.1), u32s(&want.1), "{n} {k} {d} {dtype:?} {metric:?} {device:?}");
                assert_eq!(bits(&got.0), bits(&want.0), "{n} {k} {d} {dtype:?} {metric:?} {device:?}");
            }
            assert_eq!((bits(&x_whole), bits(&c_whole)), before, "an input was written");
        }
    }
}

/// Unchecked non-finite rows and centroids: labels stay in range, other rows are unaffected.
#[test]
fn non_finite_values_stay_where_they_are() {
    let mut rng = rng(8);
    for device in devices() {
        for (dtype, bad) in
            DTYPES.into_iter().flat_map(|t| [f64::NAN, f64::INFINITY, f64::NEG_INFINITY].map(|v| (t, v)))
        {
            for (row, column) in [(0, 0), (99, 32), (63, 16), (64, 31)] {
                let (x, c) =
                    (uniform(&[100, 33], 0.0, 1.0, dtype, &mut rng), uniform(&[20, 33], 0.0, 1.0, dtype, &mut rng));
                let mut spoiled = f64s(&x);
                spoiled[row * 33 + column] = bad;
                let y = Tensor::from_vec(spoiled, (100, 33), &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
                let (y, c, x) =
                    (y.to_device(&device).unwrap(), c.to_device(&device).unwrap(), x.to_device(&device).unwrap());
                for metric in METRICS {
                    let (clean, got) = (u32s(&assign(&x, &c, metric).unwrap()), u32s(&assign(&y, &c, metric).unwrap()));
                    assert!(got[row] < 20);
                    assert!(
                        (0..100).all(|i| i == row || got[i] == clean[i]),
                        "{bad} at {row}, {column}: {dtype:?} {metric:?}"
                    );
                    // The same rows as centroids: the spoiled one is far from everything.
                    let among = u32s(&assign(&x, &y, metric).unwrap());
                    assert_eq!(among, spec_labels(&x, &y, metric), "{bad} in a centroid: {dtype:?} {metric:?}");
                }
            }
        }
    }
}

#[test]
fn degenerate_sizes() {
    for device in devices() {
        let rows = |b: usize, n: usize, d: usize| ones(&[b, n, d], DType::F32, &device);
        for metric in METRICS {
            assert_eq!(assign(&rows(2, 0, 3), &rows(2, 4, 3), metric).unwrap().dims(), [2, 0]);
            assert_eq!(assign(&rows(0, 5, 3), &rows(0, 4, 3), metric).unwrap().dims(), [0, 5]);
            assert_eq!(u32s(&assign(&rows(1, 1, 1), &rows(1, 1, 1), metric).unwrap()), [0]);
            let (labels, distances) = assign_with_distances(&rows(2, 0, 3), &rows(2, 4, 3), metric).unwrap();
            assert_eq!((labels.dims(), distances.dims()), (&[2, 0][..], &[2, 0][..]));
        }
    }
}

/// Keys of a transformer: far from isotropic, and stored in f16.
#[test]
fn real_keys() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/assets/smollm2_qkv.safetensors");
    let keys = candle_core::safetensors::load(path, &Device::Cpu).unwrap().remove("keys").unwrap();
    let x = keys.narrow(2, 100, 700).unwrap();
    let c = keys.narrow(2, 1500, 90).unwrap();
    METRICS.iter().for_each(|&m| check(&x, &c, m, &devices(), "keys"));
}

#[test]
fn quantize_returns_the_centroid_itself() {
    let mut rng = rng(9);
    for device in devices() {
        for dtype in DTYPES {
            let x = uniform(&[2, 3, 50, 5], 0.0, 1.0, dtype, &mut rng).to_device(&device).unwrap();
            let c = uniform(&[12, 5], 0.0, 1.0, dtype, &mut rng).to_device(&device).unwrap();
            let (values, labels) = quantize(&x, &c, Metric::SquaredEuclidean).unwrap();
            assert_eq!((values.dims(), values.dtype(), labels.dims()), (x.dims(), dtype, &[2, 3, 50][..]));
            let want = c.index_select(&labels.flatten_all().unwrap(), 0).unwrap();
            assert_eq!(bits(&values), bits(&want));
        }
    }
}
