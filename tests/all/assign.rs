//! Labels and distances against the specification: no label may differ, on any shape, type, metric, layout or number.

use crate::common::*;
use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use candle_flash_kmeans::{assign_with_distances, quantize, testing, Metric};
use rand::Rng;
use std::collections::BTreeSet;

const D: [usize; 35] = [
    1, 2, 3, 4, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 96, 100, 127, 128, 129, 192, 255, 256, 257, 384, 511, 512,
    513, 768, 1000, 1024, 1536, 2048, 2049, 4096,
];
const N: [usize; 20] =
    [1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 1000, 4095, 4096, 4097, 8193, 65537];
const K: [usize; 24] =
    [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 1000, 1031, 4097];
const BATCH: [usize; 4] = [1, 2, 3, 17];
/// Terms of all distances of one case: keeps the specification's share of the sweep to seconds.
const WORK: usize = 1 << 21;

/// Checks labels and distances of one call, to the bit.
#[track_caller]
fn check(x: &Tensor, c: &Tensor, metric: Metric, devices: &[Device], what: &str) {
    let (labels, distances) = expected(x, c, metric);
    for device in devices {
        let what = format!("{what}, {metric:?} {:?} {:?} on {:?}", x.dtype(), x.dims(), device.location());
        let (x, c) = (x.to_device(device).unwrap(), c.to_device(device).unwrap());
        let (got, away) = assign_with_distances(&x, &c, metric).unwrap_or_else(|e| panic!("{what}: {e}"));
        assert_eq!((got.dtype(), got.dims()), (DType::U32, &x.dims()[..x.rank() - 1]), "{what}");
        assert_eq!((away.dtype(), away.dims()), (DType::F64, got.dims()), "{what}");
        let (got, away) = (u32s(&got), f64s(&away));
        if let Some(i) = got.iter().zip(&labels).position(|(a, b)| a != b) {
            panic!("{what}: row {i} got {} at {:e}, not {} at {:e}", got[i], away[i], labels[i], distances[i]);
        }
        let wrong = away.iter().zip(&distances).position(|(a, b)| a.to_bits() != b.to_bits());
        assert_eq!(wrong, None, "{what}: distances");
    }
}

/// Cases, as indices into lists of `sizes` values each, in which every pair of values meets that can: `legal` must hold
/// for small indices if for large ones.
fn pairwise(sizes: &[usize], legal: impl Fn(&[usize]) -> bool, seed: u64) -> Vec<Vec<usize>> {
    let pairs = |case: &[usize]| -> Vec<[usize; 4]> {
        (0..case.len()).flat_map(|g| (0..g).map(move |f| (f, g))).map(|(f, g)| [f, case[f], g, case[g]]).collect()
    };
    let (mut rng, mut cases, mut open) = (rng(seed), vec![], BTreeSet::new());
    let with = |[f, i, g, j]: [usize; 4], mut case: Vec<usize>| {
        (case[f], case[g]) = (i, j);
        case
    };
    for g in 0..sizes.len() {
        for f in 0..g {
            let all = (0..sizes[f] * sizes[g]).map(|p| [f, p % sizes[f], g, p / sizes[f]]);
            open.extend(all.filter(|&p| legal(&with(p, vec![0; sizes.len()]))));
        }
    }
    while let Some(&pair) = open.first() {
        let tries = (0..20).map(|_| {
            let mut case = with(pair, sizes.iter().map(|&s| rng.random_range(0..s)).collect());
            while !legal(&case) {
                let smaller = rng.random_range(0..sizes.len());
                case[smaller] /= 2;
                case = with(pair, case);
            }
            case
        });
        let best = tries.max_by_key(|case| pairs(case).iter().filter(|p| open.contains(*p)).count()).unwrap();
        pairs(&best).iter().for_each(|p| assert!(!open.remove(p) || !open.contains(p)));
        cases.push(best);
    }
    cases
}

#[test]
fn every_shape_type_and_metric() {
    let work = |c: &[usize]| D[c[0]] * N[c[1]] * K[c[2]] * BATCH[c[3]];
    let cases = pairwise(&[D.len(), N.len(), K.len(), BATCH.len(), 4, 4, 2, 3], |c| work(c) <= WORK, 1);
    assert!(cases.len() > 500, "{}", cases.len());
    let devices = devices();
    for (seed, case) in cases.iter().enumerate() {
        let (d, n, k, b) = (D[case[0]], N[case[1]], K[case[2]], BATCH[case[3]]);
        let (dtype, metric, rng) = (DTYPES[case[4]], METRICS[case[5]], &mut rng(seed as u64));
        let x_shape = if b == 1 { vec![n, d] } else { vec![b, n, d] };
        let c_shape = if b == 1 || case[6] == 1 { vec![k, d] } else { vec![b, k, d] };
        let [x, c] = [x_shape, c_shape].map(|shape| match case[7] {
            0 => uniform(&shape, 0.0, 2.0, dtype, rng),
            // Few distinct values: many exact ties, which the lowest index must win.
            1 => integers(&shape, 2, dtype, rng),
            _ => uniform(&shape, 3.0, 1.0, dtype, rng),
        });
        check(&x, &c, metric, &devices, &format!("case {seed}, k {k}"));
    }
}

/// Rows and centroids on opposite sides of the origin, whose scores are all below zero, or would be if they started from nothing.
#[test]
fn rows_that_look_away_from_all_centroids() {
    let mut rng = rng(3);
    for dtype in [DType::F16, DType::BF16, DType::F32] {
        for (n, k, d) in [(500, 300, 24), (300, 700, 64), (260, 130, 130), (140, 90, 600)] {
            for shared in [0.0, 1.0, 30.0] {
                let x = tensor(&[n, d], dtype, |i| {
                    -shared - if i / d % 5 == 0 { 9.0 } else { 1.0 } * rng.random_range(0.1..1.0)
                });
                let c = tensor(&[k, d], dtype, |_| shared + rng.random_range(0.1..1.0));
                for (metric, device) in METRICS.into_iter().flat_map(|m| devices().into_iter().map(move |d| (m, d))) {
                    let on_device = x.to_device(&device).unwrap();
                    for kernel in testing::candidates(&on_device, k, metric).unwrap() {
                        testing::force(Some(kernel));
                        check(&x, &c, metric, std::slice::from_ref(&device), &format!("{kernel}, {shared} apart"));
                        testing::force(None);
                    }
                }
            }
        }
    }
}

/// Rows of f32 in three parts, of which one half each proves nearly none, or all: the second part and the third are then assigned without that half.
#[cfg(feature = "cuda")]
#[test]
fn parts_that_need_both_halves() {
    let mut rng = rng(4);
    for (n, d, near) in [(410_000, 17, 1e-3), (410_000, 128, 1e-3), (210_000, 40, 1.0)] {
        let centre = uniform(&[8, d], 0.0, 9.0, DType::F64, &mut rng).to_vec2::<f64>().unwrap();
        let x = tensor(&[n, d], DType::F32, |i| centre[i / d % 8][i % d] + near * rng.random_range(-1.0..1.0));
        let c = x.narrow(0, 17, 40).unwrap();
        for device in devices().into_iter().filter(Device::is_cuda) {
            check(&x, &c, Metric::SquaredEuclidean, &[device], &format!("{near} apart"));
        }
    }
}

#[test]
fn real_keys() -> Result<()> {
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/assets/smollm2_qkv.safetensors");
    let keys = candle_core::safetensors::load(file, &Device::Cpu)?.remove("keys").expect("the file's keys");
    let devices = devices();
    let x = keys.narrow(2, 1000, 700)?;
    let every_64th = keys.reshape((2, 3, 64, 64, 64))?.narrow(3, 5, 1)?.squeeze(3)?;
    for metric in METRICS {
        for dtype in DTYPES {
            check(&x.to_dtype(dtype)?, &every_64th.to_dtype(dtype)?, metric, &devices, "keys");
        }
    }
    Ok(())
}

#[test]
fn ties_go_to_the_lowest_index() -> Result<()> {
    let devices = devices();
    for (case, (n, d, k)) in
        [(40, 3, 2), (300, 17, 33), (65, 64, 130), (65, 5, 600), (10, 100, 1031)].into_iter().enumerate()
    {
        let rng = &mut rng(case as u64);
        let (x, c) = (integers(&[n, d], 8, DType::F64, rng), integers(&[k, d], 8, DType::F64, rng));
        let row = c.narrow(0, k - 1, 1)?;
        let same = row.repeat((k, 1))?;
        let twins = Tensor::cat(&[&c, &c], 0)?;
        // The last block of centroids repeats the first row, however long the blocks are.
        let late = Tensor::cat(&[&c, &c.narrow(0, 0, 1)?.repeat((700, 1))?], 0)?;
        let zeros = c.affine(0.0, 0.0)?;
        let negative_zeros = zeros.neg()?;
        let mixed = Tensor::cat(&[&negative_zeros, &zeros, &c], 0)?;
        for metric in METRICS {
            for dtype in DTYPES {
                for (name, x, c) in [
                    ("every centroid equal", &x, &same),
                    ("every centroid twice", &x, &twins),
                    ("a late twin", &x, &late),
                    ("every row equal", &row.repeat((n, 1))?, &twins),
                    ("zeros of both signs", &x, &mixed),
                    ("zero rows", &negative_zeros, &mixed),
                    ("rows that are centroids", &c.narrow(0, k - k.min(n), k.min(n))?, &twins),
                ] {
                    check(&x.to_dtype(dtype)?, &c.to_dtype(dtype)?, metric, &devices, name);
                }
            }
        }
    }
    Ok(())
}

#[test]
fn degenerate_sizes() -> Result<()> {
    for device in devices() {
        for (metric, dtype) in METRICS.into_iter().zip(DTYPES) {
            for shape in
                [vec![0, 3], vec![2, 0, 3], vec![0, 4, 3], vec![2, 0, 4, 3], vec![0, 2, 4, 3], vec![0, 0, 0, 3]]
            {
                let (x, c) = (ones(&shape, dtype, &device), ones(&[5, 3], dtype, &device));
                let (labels, distances) = assign_with_distances(&x, &c, metric)?;
                assert_eq!((labels.dims(), distances.dims()), (&shape[..shape.len() - 1], labels.dims()));
            }
        }
    }
    let devices = devices();
    for (shape, k) in
        [(vec![1, 1], 1), (vec![1, 9], 40), (vec![50, 1], 7), (vec![1, 1, 1, 6, 1], 3), (vec![2, 3, 4, 5], 4)]
    {
        for metric in METRICS {
            let (d, rng) = (shape[shape.len() - 1], &mut rng(1));
            let (x, c) = (uniform(&shape, 0.0, 1.0, DType::F32, rng), uniform(&[k, d], 0.0, 1.0, DType::F32, rng));
            check(&x, &c, metric, &devices, "degenerate");
        }
    }
    Ok(())
}

#[test]
fn quantize_returns_the_centroid_itself() -> Result<()> {
    let rng = &mut rng(9);
    for device in devices() {
        for (dtype, metric) in DTYPES.into_iter().zip(METRICS) {
            let x = uniform(&[2, 3, 50, 5], 0.0, 1.0, dtype, rng).to_device(&device)?;
            let c = uniform(&[12, 5], 0.0, 1.0, dtype, rng).to_device(&device)?;
            let (values, labels) = quantize(&x, &c, metric)?;
            assert_eq!((values.dims(), values.dtype(), labels.dims()), (x.dims(), dtype, &[2, 3, 50][..]));
            assert_same(&labels, &assign_with_distances(&x, &c, metric)?.0, "labels");
            let chosen = c.index_select(&labels.flatten_all()?, 0)?.reshape(x.shape())?;
            assert_same(&values, &chosen, "values");
        }
    }
    Ok(())
}
