//! A fit has the same bits however its rows are fed: in memory, where updates are fused, in blocks, and shared by ranks.

use crate::common::*;
use candle_core::{DType, Tensor};
use candle_flash_kmeans::{testing::fit_in_blocks, EmptyClusters, Error, Fit, Init, KMeans, Metric};
use rand::Rng;

const CUTS: [(usize, usize); 9] = [(1, 1), (2, 1), (3, 1), (8, 1), (1, 2), (1, 8), (2, 3), (5, 4), (8, 8)];

#[track_caller]
fn assert_merges(settings: &KMeans, x: &Tensor, what: &str) -> Fit {
    let whole = settings.fit(x).unwrap();
    for (blocks, ranks) in CUTS {
        let cut = fit_in_blocks(settings, x, blocks, ranks).unwrap();
        assert_same_fit(&cut, &whole, &format!("{what}: {blocks} blocks, {ranks} ranks"));
    }
    whole
}

const MERGING: [Metric; 3] = [Metric::SquaredEuclidean, Metric::Cosine, Metric::Dot];

#[test]
fn blocks_and_ranks_have_the_bits_of_the_fused_fit() {
    let mut rng = rng(1);
    let mut case = 0;
    for (dtype, metric) in DTYPES.into_iter().flat_map(|t| MERGING.map(|m| (t, m))) {
        for (shape, k) in [(&[203, 16][..], 7), (&[2, 3, 97, 5], 4), (&[3, 150, 40], 9), (&[64, 1], 3)] {
            let x = blobs(shape, 6, dtype, &mut rng);
            let [batch @ .., n, _] = shape else { unreachable!() };
            let rows = [batch, &[*n]].concat();
            let weights = tensor(&rows, DType::F64, |i| [0.0, 1.0, 3.5, 0.1, 1e-9][i % 5]);
            let lengths = tensor(batch, DType::F64, |i| (n - 11 * i) as f64).to_dtype(DType::U32).unwrap();
            let plain = KMeans::new(k).metric(metric).max_iters(12).tol(1e-3);
            for device in devices() {
                let on = |t: &Tensor| t.to_device(&device).unwrap();
                let x = on(&x);
                let settings = [
                    plain.clone(),
                    plain.clone().tol(0.0).max_iters(0),
                    plain.clone().tol(0.0).max_iters(1).init(Init::Even),
                    plain.clone().sample_weights(&on(&weights)),
                    plain.clone().lengths(&on(&lengths)),
                    plain.clone().lengths(&on(&lengths)).sample_weights(&on(&weights)).init(Init::KMeansPlusPlus),
                    plain.clone().check_finite(false),
                    plain.clone().empty_clusters(EmptyClusters::Relocate).init(Init::Given(crowded(&x, k))),
                ];
                for (i, settings) in settings.into_iter().enumerate() {
                    case += 1;
                    if !is_picked(&device, case) {
                        continue;
                    }
                    let what = format!("{metric:?} {dtype:?} {shape:?}, setting {i} on {:?}", device.location());
                    assert_merges(&settings, &x, &what);
                }
            }
        }
    }
}

/// Terms that no integer of one scale holds, in some blocks and not in others, and rows that are not finite.
#[test]
fn terms_of_all_magnitudes_merge() {
    let mut rng = rng(2);
    for (dtype, metric) in DTYPES.into_iter().flat_map(|t| MERGING.map(|m| (t, m))) {
        let most: i32 = match dtype {
            DType::F16 => 7,
            DType::F64 => 200,
            _ => 30,
        };
        for (hostile, weighted, finite) in
            [(1, false, true), (40, false, true), (40, true, true), (40, true, false), (3, false, false)]
        {
            let values = uniform(&[2, 120, 6], 0.0, 2.0, DType::F64, &mut rng);
            let mut i = 0;
            let values = tensor(&[2, 120, 6], dtype, {
                let values = f64s(&values);
                let mut powers = rng.clone();
                move |_| {
                    let row = i / 6;
                    i += 1;
                    let power = if row % (120 / hostile) == 5 { powers.random_range(-most..most) } else { 0 };
                    let bad = !finite && row % 37 == 3 && i % 4 == 0;
                    if bad {
                        f64::NAN
                    } else {
                        values[i - 1] * 2f64.powi(power)
                    }
                }
            });
            let weights = tensor(&[2, 120], DType::F64, |i| 2f64.powi((i as i32 * 7) % 90 - 45) * 1.1);
            for device in devices() {
                let x = values.to_device(&device).unwrap();
                let mut settings = KMeans::new(5).metric(metric).max_iters(6).tol(1e-4).check_finite(finite);
                if weighted {
                    settings = settings.sample_weights(&weights.to_device(&device).unwrap());
                }
                let what = format!("{metric:?} {dtype:?} {hostile} {weighted} {finite} on {:?}", device.location());
                assert_merges(&settings, &x, &what);
            }
        }
    }
}

#[test]
fn medians_are_refused_in_blocks() {
    let x = tensor(&[20, 2], DType::F32, |i| i as f64);
    let refused = fit_in_blocks(&KMeans::new(2).metric(Metric::Manhattan), &x, 2, 1);
    assert!(matches!(refused, Err(Error::Conflict { argument: "metric", .. })), "{refused:?}");
}

/// Every rank refuses what one of them finds, by its number among all rows.
#[test]
fn ranks_refuse_together() {
    let x = tensor(&[2, 90, 3], DType::F32, |i| if i == 90 * 3 + 80 * 3 { f64::NAN } else { i as f64 });
    for device in devices() {
        let x = x.to_device(&device).unwrap();
        let refused = fit_in_blocks(&KMeans::new(2), &x, 2, 4);
        assert!(matches!(refused, Err(Error::NonFinite { argument: "x", batch: 1, row: 80 })), "{refused:?}");
    }
}
