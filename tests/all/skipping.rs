//! Fits that save work have the bits of fits that do all of it in every iteration.

use crate::common::*;
use candle_core::{DType, Device, Tensor};
use candle_flash_kmeans::{testing, EmptyClusters, Fit, Init, KMeans, Metric};
use rand::Rng;

/// The fit that saves nothing, to whose bits those are held that save what they can, or what pays.
#[track_caller]
fn assert_saves_no_bit(settings: &KMeans, x: &Tensor, what: &str) -> Fit {
    let fit = |skip| {
        testing::force_skipping(skip);
        let fit = settings.fit(x).unwrap();
        testing::force_skipping(None);
        fit
    };
    let dense = fit(Some(false));
    for skip in [Some(true), None] {
        assert_same_fit(&fit(skip), &dense, &format!("{what}, skipping {skip:?}"));
    }
    dense
}

const SUMMED: [Metric; 3] = [Metric::SquaredEuclidean, Metric::Cosine, Metric::Dot];

#[test]
fn work_that_is_saved_changes_no_bit() {
    let mut rng = rng(91);
    for (dtype, metric) in DTYPES.into_iter().flat_map(|t| SUMMED.map(|m| (t, m))) {
        for (shape, k) in [(&[1203, 16][..], 37), (&[2, 3, 197, 5], 12), (&[3, 450, 40], 90)] {
            let x = blobs(shape, 6, dtype, &mut rng);
            let [batch @ .., n, _] = shape else { unreachable!() };
            let weights = tensor(&[batch, &[*n]].concat(), DType::F64, |i| [0.0, 1.0, 3.5, 0.1, 1e-9][i % 5]);
            let lengths = tensor(batch, DType::F64, |i| (n - 11 * i) as f64).to_dtype(DType::U32).unwrap();
            let plain = KMeans::new(k).metric(metric).max_iters(30).tol(0.0);
            let settings = [
                plain.clone(),
                plain.clone().tol(1e-3).n_init(2),
                plain.clone().max_iters(1).init(Init::Even),
                plain.clone().sample_weights(&weights),
                plain.clone().lengths(&lengths),
                plain.clone().lengths(&lengths).sample_weights(&weights).init(Init::KMeansPlusPlus),
                plain.clone().check_finite(false),
                plain.clone().empty_clusters(EmptyClusters::Relocate).init(Init::Given(crowded(&x, k))),
            ];
            for (i, settings) in settings.into_iter().enumerate() {
                assert_saves_no_bit(&settings, &x, &format!("{metric:?} {dtype:?} {shape:?}, setting {i}"));
            }
        }
    }
}

/// Points of a lattice, each several times: most distances have equals, and so have many centroids.
#[test]
fn ties_are_decided_alike() {
    let mut rng = rng(92);
    for (dtype, metric) in DTYPES.into_iter().flat_map(|t| SUMMED.map(|m| (t, m))) {
        for (n, d, limit) in [(1500, 3, 3), (1500, 8, 1), (900, 2, 6)] {
            let x = integers(&[n, d], limit, dtype, &mut rng);
            let plain = KMeans::new(60).metric(metric).max_iters(30).tol(0.0);
            let doubled = Tensor::cat(&[x.narrow(0, 0, 30).unwrap(), x.narrow(0, 0, 30).unwrap()], 0).unwrap();
            for (settings, what) in [
                (plain.clone(), "rows"),
                (plain.clone().init(Init::Given(doubled)), "centroids twice"),
                (plain.clone().empty_clusters(EmptyClusters::Relocate), "relocated"),
            ] {
                assert_saves_no_bit(&settings, &x, &format!("{what} {metric:?} {dtype:?} {n} {d}"));
            }
        }
    }
}

/// Terms that no integer of the scale holds, and rows that are not finite.
#[test]
fn terms_of_all_magnitudes_are_added_alike() {
    let mut rng = rng(93);
    for (dtype, metric) in DTYPES.into_iter().flat_map(|t| SUMMED.map(|m| (t, m))) {
        let most = match dtype {
            DType::F16 => 7,
            DType::F64 => 200,
            _ => 30,
        };
        for (hostile, finite) in [(1, true), (40, true), (40, false), (3, false)] {
            let shape = [2, 320, 6];
            let values = f64s(&uniform(&shape, 0.0, 2.0, DType::F64, &mut rng));
            let x = tensor(&shape, dtype, |i| {
                let row = i / 6;
                let power = if row % (120 / hostile) == 5 { rng.random_range(-most..most) } else { 0 };
                match !finite && row % 37 == 3 && i % 4 == 0 {
                    true => [f64::NAN, f64::INFINITY][i / 4 % 2],
                    false => values[i] * 2f64.powi(power),
                }
            });
            let weights = tensor(&[2, 320], DType::F64, |i| [0.0, 1.0, 1e-30, 0.1, 1e9][i % 5]);
            let plain = KMeans::new(20).metric(metric).max_iters(20).tol(0.0).check_finite(false);
            assert_saves_no_bit(&plain, &x, &format!("{metric:?} {dtype:?} {hostile} {finite}"));
            let weighted = plain.sample_weights(&weights);
            assert_saves_no_bit(&weighted, &x, &format!("{metric:?} {dtype:?} {hostile} {finite} weighted"));
        }
    }
}

/// Later updates read the rows that have changed alone.
#[test]
fn later_updates_add_changed_rows_alone() {
    let x = blobs(&[20_000, 16], 40, DType::F32, &mut rng(94));
    let settings = KMeans::new(40).max_iters(6).tol(0.0);
    testing::launches();
    settings.fit(&x).unwrap();
    let changed = testing::launches().iter().filter(|kernel| *kernel == "cpu_sums_changed_f32").count();
    assert!((1..6).contains(&changed), "{changed} of 6 updates");
}

#[test]
fn threads_change_no_bit() {
    let x = blobs(&[20_000, 16], 300, DType::F32, &mut rng(95)).to_device(&Device::Cpu).unwrap();
    let settings = KMeans::new(200).max_iters(25).tol(0.0);
    let alone = assert_saves_no_bit(&settings, &x, "all threads");
    for threads in [1, 2, 7] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let fit = pool.install(|| assert_saves_no_bit(&settings, &x, &format!("{threads} threads")));
        assert_same_fit(&fit, &alone, &format!("{threads} threads"));
    }
}
