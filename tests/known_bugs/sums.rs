//! Sums and means are exact, whatever else is in the tensor.

use super::common::*;
use candle_core::{DType, Device, Tensor};
use candle_flash_kmeans::{cluster_means, cluster_sums, Fit, Init, KMeans, Metric};
use rand::Rng;
use rand_chacha::ChaCha8Rng;

/// The largest number of a type.
fn largest(dtype: DType) -> f64 {
    match dtype {
        DType::F16 => 65504.0,
        DType::BF16 => f64::from(half::bf16::MAX),
        DType::F32 => f64::from(f32::MAX),
        _ => f64::MAX,
    }
}

/// Exponents of the numbers of a type.
fn exponents(dtype: DType) -> std::ops::Range<i32> {
    match dtype {
        DType::F16 => -24..15,
        DType::BF16 => -133..127,
        DType::F32 => -149..127,
        _ => -1074..1023,
    }
}

fn power(e: i32) -> f64 {
    2f64.powi(e / 2) * 2f64.powi(e - e / 2)
}

/// Values of all magnitudes, of which some cancel.
fn wild(shape: &[usize], dtype: DType, rng: &mut ChaCha8Rng) -> Tensor {
    let n: usize = shape.iter().product();
    let mut values: Vec<f64> =
        (0..n).map(|_| rng.random_range(-1.0..1.0) * 2.0 * power(rng.random_range(exponents(dtype)))).collect();
    for i in (0..n / 4).filter(|i| i % 2 == 0) {
        values[n - 1 - i] = -values[i];
    }
    values[0] = largest(dtype);
    tensor(shape, dtype, |i| values[i])
}

/// Sums and means by the specification, rounded to the dtype once.
fn reference(x: &Tensor, labels: &Tensor, k: usize) -> [Vec<f64>; 2] {
    let (mut sums, mut means) = (vec![], vec![]);
    for (rows, of) in problems(x).iter().zip(labels.to_vec2::<u32>().unwrap()) {
        for (j, c) in (0..k).flat_map(|j| (0..rows[0].len()).map(move |c| (j, c))) {
            let members: Vec<_> = (0..rows.len()).filter(|&i| of[i] as usize == j).collect();
            let sum = naive::exact_sum(members.iter().map(|&i| rows[i][c]));
            let of = |by: f64| if members.is_empty() { 0.0 } else { naive::quotient(sum, (by, 0)) };
            sums.push(stored(of(1.0), x.dtype()));
            means.push(stored(of(members.len() as f64), x.dtype()));
        }
    }
    [sums, means]
}

/// As a dtype stores it: infinite beyond its range.
fn stored(v: f64, dtype: DType) -> f64 {
    let rounded = if v.is_finite() { round(v, dtype) } else { v };
    if rounded.abs() > largest(dtype) {
        rounded.signum() * f64::INFINITY
    } else {
        rounded
    }
}

#[track_caller]
fn assert_exact(x: &Tensor, labels: &Tensor, k: usize, what: &str) {
    let [sums, means] = reference(x, labels, k);
    for device in devices() {
        let [x, labels] = [x, labels].map(|t| t.to_device(&device).unwrap());
        let what = format!("{what} {:?} {:?} on {:?}", x.dims(), x.dtype(), device.location());
        assert_eq!(f64s(&cluster_means(&x, &labels, k).unwrap()), means, "means: {what}");
        assert_eq!(f64s(&cluster_sums(&x, &labels, k).unwrap()), sums, "sums: {what}");
    }
}

fn labels_of(b: usize, n: usize, k: usize, rng: &mut ChaCha8Rng) -> Tensor {
    let labels: Vec<u32> = (0..b * n).map(|_| rng.random_range(0..k as u32)).collect();
    Tensor::from_vec(labels, (b, n), &Device::Cpu).unwrap()
}

/// A value that stands for none, as rasters have, is no reason for other clusters to be 0. (scikit-learn's are.)
#[test]
fn a_huge_value_changes_its_own_cluster_alone() {
    for device in devices() {
        let x = Tensor::new(&[[f32::MAX], [0.1], [0.3]], &device).unwrap();
        let means = cluster_means(&x, &Tensor::new(&[0u32, 1, 1], &device).unwrap(), 2).unwrap();
        let mean = (f64::from(0.1f32) + f64::from(0.3f32)) / 2.0;
        assert_eq!(means.to_vec2::<f32>().unwrap(), [[f32::MAX], [mean as f32]]);
    }
    let mut rng = rng(71);
    for dtype in [DType::BF16, DType::F32, DType::F64] {
        for d in [1, 3, 8, 32] {
            let blobs = blobs(&[600, d], 5, dtype, &mut rng);
            let none = stored(-3.4e38, dtype).max(-largest(dtype));
            let holed = Tensor::cat(&[&tensor(&[1, d], dtype, |_| none), &blobs], 0).unwrap();
            let start = blobs.narrow(0, 0, 5).unwrap();
            let alone = fit_from(&start, &KMeans::new(5).tol(0.0), &blobs);
            let start = Tensor::cat(&[&start, &tensor(&[1, d], dtype, |_| none)], 0).unwrap();
            let fit = fit_from(&start, &KMeans::new(6).tol(0.0), &holed);
            let what = format!("{dtype:?} of {d} columns");
            assert_same(&fit.centroids.narrow(0, 0, 5).unwrap(), &alone.centroids, &what);
            assert_same(&fit.labels.narrow(0, 1, 600).unwrap(), &alone.labels, &what);
        }
    }
}

#[test]
fn sums_of_any_magnitudes_are_exact() {
    let mut rng = rng(72);
    for dtype in DTYPES {
        for (b, n, k, d) in
            [(1, 40, 3, 1), (2, 300, 4, 5), (1, 500, 1, 64), (1, 70, 2, 300), (3, 2500, 7, 8), (1, 9000, 2, 2)]
        {
            let labels = labels_of(b, n, k, &mut rng);
            assert_exact(&wild(&[b, n, d], dtype, &mut rng), &labels, k, "wild");
            // Only the second of several problems is.
            if b > 1 {
                let all = [uniform(&[1, n, d], 0.3, 1.0, dtype, &mut rng), wild(&[1, n, d], dtype, &mut rng)];
                let last = uniform(&[b - 2, n, d], 0.0, 1e-6, dtype, &mut rng);
                let x = if b > 2 { Tensor::cat(&[&all[0], &all[1], &last], 0) } else { Tensor::cat(&all, 0) };
                assert_exact(&x.unwrap(), &labels, k, "one wild problem");
            }
        }
    }
}

#[test]
fn sums_that_cancel_leave_what_is_left() {
    for (dtype, huge, small) in [
        (DType::F64, 1e300, 1.0),
        (DType::F64, f64::MAX, 1e-300),
        (DType::F64, 1e300, 5e-324),
        (DType::F32, f64::from(f32::MAX), 1e-40),
        (DType::F32, 1e30, 1.0),
        (DType::BF16, 1e38, 1e-38),
        (DType::F16, 65504.0, 1e-7),
    ] {
        for rows in [vec![huge, small, -huge], vec![small, huge, -huge], vec![-huge, huge, small, small, -small]] {
            let n = rows.len();
            let x = tensor(&[1, n, 1], dtype, |i| rows[i]);
            assert_exact(&x, &Tensor::zeros((1, n), DType::U32, &Device::Cpu).unwrap(), 1, "cancelling");
            let sum = naive::exact_sum(f64s(&x).into_iter());
            assert_eq!(naive::quotient(sum, (1.0, 0)), round(small, dtype));
        }
    }
}

#[test]
fn means_at_the_ends_of_the_range_are_within_it() {
    for dtype in DTYPES {
        let least = power(exponents(dtype).start);
        for v in [largest(dtype), -largest(dtype), least, -least, 3.0 * least] {
            for n in [1, 2, 3, 1000] {
                let x = tensor(&[1, n, 2], dtype, |_| v);
                let labels = Tensor::zeros((1, n), DType::U32, &Device::Cpu).unwrap();
                assert_exact(&x, &labels, 1, &format!("{n} of {v:e}"));
                for device in devices() {
                    let [x, labels] = [&x, &labels].map(|t| t.to_device(&device).unwrap());
                    assert_eq!(f64s(&cluster_means(&x, &labels, 1).unwrap()), [v, v], "{n} of {v:e} {dtype:?}");
                }
            }
        }
    }
}

/// One huge element of a row is no matter of its other columns, nor of its cluster's other rows.
#[test]
fn one_huge_element_changes_its_own_column_alone() {
    let mut rng = rng(73);
    for (dtype, times) in [(DType::BF16, 1e30), (DType::F32, 1e30), (DType::F64, 1e30), (DType::F64, 1e300)] {
        for d in [2, 8, 33, 64] {
            let (x, n) = (uniform(&[1, 400, d], 0.3, 1.0, dtype, &mut rng), 400);
            let v = f64s(&x);
            let x = tensor(&[1, n, d], dtype, |i| if i == 7 * d { v[i] * times } else { v[i] });
            assert_exact(&x, &labels_of(1, n, 3, &mut rng), 3, "one huge element");
        }
    }
}

/// Squares beyond f32, and a tolerance that is relative to them.
#[test]
fn the_tolerance_is_relative_at_any_magnitude() {
    let mut rng = rng(74);
    for (dtype, d) in [DType::BF16, DType::F32, DType::F64].into_iter().flat_map(|t| [1, 2, 32].map(|d| (t, d))) {
        let x = blobs(&[500, d], 4, dtype, &mut rng);
        let (v, settings) = (f64s(&x), KMeans::new(4).tol(0.05));
        let fits = [0, 100, -60].map(|e| {
            let x = tensor(&[500, d], dtype, |i| v[i] * power(e));
            (fit_from(&x.narrow(0, 0, 4).unwrap(), &settings, &x), power(e))
        });
        for (fit, scale) in &fits {
            assert_same(&fit.labels, &fits[0].0.labels, "labels");
            assert_same(&fit.n_iter, &fits[0].0.n_iter, "iterations");
            let scaled: Vec<_> = f64s(&fits[0].0.centroids).iter().map(|c| c * scale).collect();
            assert_eq!(f64s(&fit.centroids), scaled, "{dtype:?}");
        }
    }
}

/// Weights matter by their ratios: whatever their unit is, fits are the same, on every path.
#[test]
fn weights_of_any_unit_are_the_same_weights() {
    let mut rng = rng(75);
    for (dtype, d, metric) in
        DTYPES.into_iter().flat_map(|t| [1, 3, 32].map(|d| (t, d))).flat_map(|(t, d)| METRICS.map(|m| (t, d, m)))
    {
        let x = blobs(&[300, d], 4, dtype, &mut rng);
        let w: Vec<f64> = (0..300).map(|i| f64::from(i % 5)).collect();
        let start = x.narrow(0, 0, 4).unwrap();
        let fit = |unit: i32| {
            let weights = tensor(&[300], DType::F64, |i| w[i] * power(unit));
            let on = |device: &Device| {
                let (x, start) = (x.to_device(device).unwrap(), start.to_device(device).unwrap());
                let settings = KMeans::new(4).metric(metric).init(Init::Given(start)).tol(0.0);
                settings.sample_weights(&weights.to_device(device).unwrap()).fit(&x).unwrap()
            };
            let fits: Vec<Fit> = devices().iter().map(on).collect();
            fits.iter().for_each(|fit| assert_same_fit(fit, &fits[0], "devices differ"));
            fits.into_iter().next().unwrap()
        };
        let plain = fit(0);
        for unit in [-1060, -1000, -300, 300, 900, 1018] {
            let what = format!("{dtype:?} {d} {metric:?} in 2^{unit}");
            let scaled = fit(unit);
            assert_same(&scaled.centroids, &plain.centroids, &what);
            assert_same(&scaled.labels, &plain.labels, &what);
            if unit > -1000 {
                assert_eq!(f64s(&scaled.inertia)[0], f64s(&plain.inertia)[0] * power(unit), "{what}");
            }
        }
    }
}

/// Weights that are worlds apart: a cluster of light rows has a mean all the same.
#[test]
fn light_rows_have_a_mean_beside_heavy_ones() {
    for dtype in DTYPES {
        for (d, metric) in [1, 2, 32].into_iter().flat_map(|d| METRICS.map(|m| (d, m))) {
            // Two directions far apart; the second cluster's rows weigh next to nothing.
            let rows = [1.0, 2.0, 3.0, -4.0, -5.0, -6.0, -7.0];
            let x = tensor(&[7, d], dtype, |i| if i % d == 0 { rows[i / d] } else { 0.5 });
            for light in [1e-40, 1e-200, 1e-290] {
                let w = [1.0, 1.0, 1.0, light, light, light, light];
                let mut first: Option<Fit> = None;
                for device in devices() {
                    let x = x.to_device(&device).unwrap();
                    let start = x.index_select(&Tensor::new(&[0u32, 3], &device).unwrap(), 0).unwrap();
                    let settings = KMeans::new(2).metric(metric).init(Init::Given(start)).tol(0.0).max_iters(3);
                    let fit = settings.sample_weights(&Tensor::new(&w, &device).unwrap()).fit(&x).unwrap();
                    if metric == Metric::SquaredEuclidean || metric == Metric::Manhattan {
                        let middle = if metric == Metric::Manhattan { [2.0, -6.0] } else { [2.0, -5.5] };
                        let got = f64s(&fit.centroids);
                        assert_eq!([got[0], got[d]], middle, "{dtype:?} {d} {metric:?} {light:e}");
                    }
                    if let Some(first) = &first {
                        assert_same_fit(first, &fit, "devices differ");
                    }
                    first.get_or_insert(fit);
                }
            }
        }
    }
}

/// Medians are by exact sums of weights.
#[test]
fn medians_count_the_lightest_weight() {
    // Half of the weight is below the third row but for the last one, which decides.
    let x = tensor(&[4, 1], DType::F32, |i| i as f64);
    for (light, median) in [(0.0, 0.0), (1e-30, 1.0), (1e-200, 1.0), (1e-300, 1.0)] {
        for (w, want) in [
            ([1.0, 0.5, 0.5, light], median),
            ([0.5, 0.5, 1.0 + f64::EPSILON, light], 2.0),
            ([1.0, light, 0.25, 0.75], median),
        ] {
            for device in devices() {
                let start = Tensor::zeros((1, 1), DType::F32, &device).unwrap();
                let settings = KMeans::new(1).metric(Metric::Manhattan).init(Init::Given(start)).max_iters(1);
                let fit =
                    settings.sample_weights(&Tensor::new(&w, &device).unwrap()).fit(&x.to_device(&device).unwrap());
                assert_eq!(f64s(&fit.unwrap().centroids), [want], "{w:?} on {:?}", device.location());
            }
        }
    }
}

/// A distance beyond f64 is no distance of 0.
#[test]
fn infinite_distances_are_in_the_inertia() {
    let x = tensor(&[4, 2], DType::F64, |i| if i / 2 % 2 == 0 { 1e200 } else { -1e200 });
    let start = tensor(&[1, 2], DType::F64, |_| 0.0);
    assert_eq!(f64s(&fit_from(&start, &KMeans::new(1), &x).inertia), [f64::INFINITY]);
    let near = tensor(&[4, 2], DType::F64, |i| if i / 2 % 2 == 0 { 1e100 } else { -1e100 });
    assert_eq!(f64s(&fit_from(&start, &KMeans::new(1), &near).inertia), [8e200]);
    // One of two problems.
    let both = Tensor::stack(&[&x, &near], 0).unwrap();
    let start = tensor(&[2, 1, 2], DType::F64, |_| 0.0);
    assert_eq!(f64s(&fit_from(&start, &KMeans::new(1), &both).inertia), [f64::INFINITY, 8e200]);
}

/// With the check off, rows that are not finite weigh nothing: others have the fit that they have alone.
#[test]
fn rows_that_are_not_finite_weigh_nothing() {
    let mut rng = rng(76);
    for (dtype, metric) in DTYPES.into_iter().flat_map(|t| METRICS.map(|m| (t, m))) {
        for (n, d, weighted) in [1, 3, 32, 300].into_iter().flat_map(|d| [(200, d, false), (200, d, true)]) {
            let x = blobs(&[n, d], 4, dtype, &mut rng);
            // Every tenth row is spoilt, in its last column or in all.
            let bad = |i: usize| i % 10 == 9;
            let v = f64s(&x);
            let spoilt = tensor(&[n, d], dtype, |i| match i / d / 10 % 3 {
                0 if bad(i / d) && i % d == d - 1 => f64::NAN,
                1 if bad(i / d) => f64::NEG_INFINITY,
                2 if bad(i / d) && i % d == 0 => f64::INFINITY,
                _ => v[i],
            });
            let good: Vec<u32> = (0..n as u32).filter(|&i| !bad(i as usize)).collect();
            let weights = tensor(&[n], DType::F64, |i| 1.0 + (i % 3) as f64);
            let mut first: Option<Fit> = None;
            for device in devices() {
                let at = Tensor::new(&good[..], &device).unwrap();
                let [x, spoilt, weights] = [&x, &spoilt, &weights].map(|t| t.to_device(&device).unwrap());
                let start = x.narrow(0, 0, 4).unwrap().contiguous().unwrap();
                let settings = |w: &Tensor| {
                    let settings = KMeans::new(4).metric(metric).tol(0.0).max_iters(6).init(Init::Given(start.clone()));
                    if weighted {
                        settings.sample_weights(w)
                    } else {
                        settings
                    }
                };
                let alone =
                    settings(&weights.index_select(&at, 0).unwrap()).fit(&x.index_select(&at, 0).unwrap()).unwrap();
                let fit = settings(&weights).check_finite(false).fit(&spoilt).unwrap();
                let what = format!("{dtype:?} {metric:?} {n} x {d}, {weighted} on {:?}", device.location());
                assert_same(&fit.centroids, &alone.centroids, &what);
                assert_same(&fit.inertia, &alone.inertia, &what);
                assert_same(&fit.labels.index_select(&at, 0).unwrap(), &alone.labels, &what);
                if let Some(first) = &first {
                    assert_same(&first.centroids, &fit.centroids, &what);
                }
                first.get_or_insert(fit);
            }
        }
        // Means of given labels, which may have none but such rows.
        for device in devices() {
            let x =
                tensor(&[5, 2], dtype, |i| [1.0, 2.0, f64::NAN, 7.0, 3.0, 6.0, 8.0, f64::INFINITY, f64::NAN, 1.0][i]);
            let labels = Tensor::new(&[0u32, 0, 0, 1, 2], &device).unwrap();
            let means = cluster_means(&x.to_device(&device).unwrap(), &labels, 3).unwrap();
            assert_eq!(f64s(&means), [2.0, 4.0, 0.0, 0.0, 0.0, 0.0]);
        }
    }
}

/// Rows of one column, sorted or not, have the same sums where those are wide.
#[test]
fn one_column_is_like_any_other() {
    let mut rng = rng(77);
    for dtype in [DType::BF16, DType::F32] {
        let x = wild(&[400, 1], dtype, &mut rng);
        let start = tensor(&[5, 1], dtype, |i| [-1e30, -1.0, 0.0, 1e-20, 1e25][i]);
        let sorted = fit_from(&start, &KMeans::new(5).tol(0.0).max_iters(4), &x);
        // A column of zeros keeps rows from being sorted.
        let two = |t: &Tensor| Tensor::cat(&[t, &t.zeros_like().unwrap()], 1).unwrap();
        let general = fit_from(&two(&start), &KMeans::new(5).tol(0.0).max_iters(4), &two(&x));
        assert_same(&sorted.labels, &general.labels, "labels");
        assert_same(&sorted.centroids, &general.centroids.narrow(1, 0, 1).unwrap(), "centroids");
    }
}
