//! Fits that save work have the bits of fits that do all of it in every iteration.

use crate::common::*;
use candle_core::{DType, Device, Tensor};
use candle_flash_kmeans::{testing, EmptyClusters, Fit, Init, KMeans, Metric, PreparedFit};
use rand::Rng;

/// The fit that saves nothing, to whose bits those are held that save what they can, or what pays; on a GPU with the kernel that knows near
/// groups, where it can do the work.
#[track_caller]
pub fn assert_same_on(device: &Device, settings: &KMeans, x: &Tensor, what: &str) -> Fit {
    let x = x.to_device(device).unwrap();
    let fit = |skip| {
        testing::force_skipping(skip);
        testing::force(device.is_cuda().then_some(NEAR));
        let fit = settings.fit(&x).unwrap();
        testing::force(None);
        testing::force_skipping(None);
        fit
    };
    let dense = fit(Some(false));
    for skip in [Some(true), None] {
        assert_same_fit(&fit(skip), &dense, &format!("{what}, skipping {skip:?} on {:?}", device.location()));
    }
    dense
}

/// The assignment kernel whose fits may score near groups alone.
const NEAR: &str = "assign_sm90";

/// A prepared fit that saves what it can, by that kernel.
pub fn prepare_skipping(settings: &KMeans, shape: &[usize], dtype: DType, device: &Device) -> PreparedFit {
    testing::force_skipping(Some(true));
    testing::force(device.is_cuda().then_some(NEAR));
    let prepared = settings.prepare(shape, dtype, device).unwrap();
    testing::force(None);
    testing::force_skipping(None);
    prepared
}

/// The same on every device, for settings whose tensors are where the rows are. Returns the CPU's.
#[track_caller]
fn assert_saves_no_bit_on(settings: impl Fn(&Device) -> KMeans, x: &Tensor, what: &str) -> Fit {
    let mut fits: Vec<_> = devices().iter().map(|device| assert_same_on(device, &settings(device), x, what)).collect();
    fits.swap_remove(0)
}

#[track_caller]
fn assert_saves_no_bit(settings: &KMeans, x: &Tensor, what: &str) -> Fit {
    assert_saves_no_bit_on(|_| settings.clone(), x, what)
}

/// The same from given centroids.
#[track_caller]
fn assert_saves_no_bit_from(start: &Tensor, settings: &KMeans, x: &Tensor, what: &str) -> Fit {
    let start = |device: &Device| Init::Given(start.to_device(device).unwrap());
    assert_saves_no_bit_on(|device| settings.clone().init(start(device)), x, what)
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
            let settings = |device: &Device| {
                let [weights, lengths, start] =
                    [&weights, &lengths, &crowded(&x, k)].map(|t| t.to_device(device).unwrap());
                [
                    plain.clone(),
                    plain.clone().tol(1e-3).n_init(2),
                    plain.clone().max_iters(1).init(Init::Even),
                    plain.clone().sample_weights(&weights),
                    plain.clone().lengths(&lengths),
                    plain.clone().lengths(&lengths).sample_weights(&weights).init(Init::KMeansPlusPlus),
                    plain.clone().check_finite(false),
                    plain.clone().empty_clusters(EmptyClusters::Relocate).init(Init::Given(start)),
                ]
            };
            for i in 0..8 {
                let what = format!("{metric:?} {dtype:?} {shape:?}, setting {i}");
                assert_saves_no_bit_on(|device| settings(device)[i].clone(), &x, &what);
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
            let what = |what: &str| format!("{what} {metric:?} {dtype:?} {n} {d}");
            assert_saves_no_bit(&plain, &x, &what("rows"));
            assert_saves_no_bit_from(&doubled, &plain, &x, &what("centroids twice"));
            assert_saves_no_bit(&plain.empty_clusters(EmptyClusters::Relocate), &x, &what("relocated"));
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
            let weighted = |device: &Device| plain.clone().sample_weights(&weights.to_device(device).unwrap());
            assert_saves_no_bit_on(weighted, &x, &format!("{metric:?} {dtype:?} {hostile} {finite} weighted"));
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
    let x = blobs(&[20_000, 16], 300, DType::F32, &mut rng(95));
    let settings = KMeans::new(200).max_iters(25).tol(0.0);
    let alone = assert_same_on(&Device::Cpu, &settings, &x, "all threads");
    for threads in [1, 2, 7] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let fit = pool.install(|| assert_same_on(&Device::Cpu, &settings, &x, &format!("{threads} threads")));
        assert_same_fit(&fit, &alone, &format!("{threads} threads"));
    }
}

/// Passes compare fewer and fewer centroids as these come to rest.
#[test]
fn later_passes_skip_groups_of_centroids() {
    // With a matrix unit, where there is one, and without.
    for (columns, dtype) in [(40, DType::F32), (12, DType::F16)] {
        let x = blobs(&[3000, columns], 30, dtype, &mut rng(96));
        let settings = KMeans::new(64).max_iters(12).tol(0.0).init(Init::Even);
        testing::passes();
        assert_same_on(&Device::Cpu, &settings, &x, "clusters");
        let dense: Vec<f64> = testing::passes().iter().map(|pass| pass.products).take(3).collect();
        assert_eq!(dense, [1.0; 3]);
        testing::force_skipping(Some(true));
        settings.fit(&x).unwrap();
        testing::force_skipping(None);
        let passes = testing::passes();
        assert!(passes[..2].iter().all(|pass| pass.products == 1.0), "{passes:?}");
        assert!(passes[2..].iter().all(|pass| pass.products < 1.0), "{passes:?}");
        let last = passes[passes.len() - 1];
        assert!(last.products < 0.2 && last.moved <= passes[1].moved, "{passes:?}");
    }
}

/// Centroids that have no bound, or one that is of no use.
#[test]
fn hostile_centroids_are_skipped_by_nobody() {
    let mut rng = rng(97);
    for dtype in DTYPES {
        let far = if dtype == DType::F16 { 6e4 } else { 1e30 };
        for (n, d, k) in [(700, 40, 48), (700, 6, 48), (700, 40, 330)] {
            let x = blobs(&[n, d], 20, dtype, &mut rng);
            let values = f64s(&x);
            for (what, value) in [("NaN", f64::NAN), ("infinite", f64::INFINITY), ("far", far), ("rather far", 1e3)] {
                let start = tensor(&[k, d], dtype, |i| if i / d % 9 == 4 && i % 3 == 0 { value } else { values[i] });
                let plain = KMeans::new(k).max_iters(15).tol(0.0).check_finite(false);
                for settings in [plain.clone(), plain.empty_clusters(EmptyClusters::Relocate)] {
                    assert_saves_no_bit_from(&start, &settings, &x, &format!("{what} {dtype:?} {d}"));
                }
            }
        }
    }
}

/// Distances that differ by less than scores tell apart.
#[test]
fn rows_far_from_the_origin_are_labelled_alike() {
    let mut rng = rng(98);
    for (dtype, unit, origin) in
        [(DType::F32, 2f64.powi(-8), 4096.0), (DType::F16, 1.0, 1000.0), (DType::BF16, 1.0, 128.0)]
    {
        for d in [3, 36] {
            let x = tensor(&[800, d], dtype, |_| origin + unit * f64::from(rng.random_range(-3i32..4)));
            let settings = KMeans::new(50).max_iters(15).tol(0.0);
            assert_saves_no_bit(&settings, &x, &format!("{dtype:?} {d}"));
        }
    }
}

/// A fit that is run again knows nothing of the rows before.
#[test]
fn prepared_fits_begin_anew() {
    let mut rng = rng(99);
    for (n, k, d, dtype) in [
        (600, 40, 6, DType::F32),
        (600, 40, 40, DType::F32),
        (3001, 300, 40, DType::F16),
        (2500, 130, 128, DType::BF16),
    ] {
        let settings = KMeans::new(k).max_iters(10).tol(0.0);
        let rows = [(); 3].map(|()| blobs(&[n, d], 25, dtype, &mut rng));
        for device in devices() {
            let mut prepared = prepare_skipping(&settings, &[n, d], dtype, &device);
            for x in [&rows[0], &rows[1], &rows[0], &rows[2]] {
                prepared.run(&x.to_device(&device).unwrap()).unwrap();
                let dense = assert_same_on(&device, &settings, x, "alone");
                assert_same_fit(&prepared.fit().unwrap(), &dense, "again");
            }
        }
    }
}
