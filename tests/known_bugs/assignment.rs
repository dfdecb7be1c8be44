//! Labels: no row or centroid may cost the others more than a constant, and none may be wrong.

use super::common::*;
use candle_core::{DType, Device, Tensor};
use candle_flash_kmeans::{
    assign, assign_with_distances, cluster_sums, quantize, sort_by_cluster, testing, Error, Init, KMeans, Metric,
};
use rand::Rng;
use rand_chacha::ChaCha8Rng;

/// Checks the labels of every device against the specification.
#[track_caller]
fn check(x: &Tensor, c: &Tensor, metric: Metric, what: &str) {
    let want = spec_labels(x, c, metric);
    for device in devices() {
        let got = u32s(&assign(&x.to_device(&device).unwrap(), &c.to_device(&device).unwrap(), metric).unwrap());
        if let Some(i) = got.iter().zip(&want).position(|(a, b)| a != b) {
            let (location, dtype) = (device.location(), x.dtype());
            panic!(
                "{what}, {metric:?} {dtype:?} {:?} on {location:?}: row {i} got {}, not {}",
                x.dims(),
                got[i],
                want[i]
            );
        }
    }
}

/// The largest finite number.
fn largest(dtype: DType) -> f64 {
    match dtype {
        DType::F16 => 65504.0,
        DType::BF16 => 3.3e38,
        DType::F32 => f32::MAX as f64,
        _ => f64::MAX,
    }
}

/// Numbers in (-1, 1) as rows, of which some are changed.
fn changed(shape: [usize; 2], dtype: DType, rng: &mut ChaCha8Rng, change: impl Fn(usize, &mut [f64])) -> Tensor {
    let mut values: Vec<f64> = (0..shape[0] * shape[1]).map(|_| rng.random_range(-1.0..1.0)).collect();
    values.chunks_mut(shape[1]).enumerate().for_each(|(i, row)| change(i, row));
    tensor(&shape, dtype, |i| values[i].clamp(-largest(dtype), largest(dtype)))
}

fn scaled(row: &mut [f64], by: f64) {
    row.iter_mut().for_each(|v| *v *= by);
}

const SHAPES: [[usize; 3]; 4] = [[90, 40, 1], [120, 70, 3], [70, 33, 17], [24, 520, 20]];

#[test]
fn outliers_of_every_size_leave_all_labels_exact() {
    let mut rng = rng(301);
    for [n, k, d] in SHAPES {
        for dtype in DTYPES {
            for factor in [1e3, 1e10, 1e18, 1e30, 1e-10, 1e-30] {
                let plain = |_, _: &mut [f64]| {};
                let first = |i, row: &mut [f64]| scaled(row, if i == 0 { factor } else { 1.0 });
                let tenth = |i, row: &mut [f64]| scaled(row, if i % 10 == 3 { factor } else { 1.0 });
                let most = |i, row: &mut [f64]| scaled(row, if i % 10 != 3 { factor } else { 1.0 });
                let each = |i: usize, row: &mut [f64]| scaled(row, factor.powf(i as f64 / 20.0));
                let [x, one, some, many, all] = [
                    changed([n, d], dtype, &mut rng, plain),
                    changed([n, d], dtype, &mut rng, first),
                    changed([n, d], dtype, &mut rng, tenth),
                    changed([n, d], dtype, &mut rng, most),
                    changed([n, d], dtype, &mut rng, each),
                ];
                let cs = [
                    changed([k, d], dtype, &mut rng, first),
                    changed([k, d], dtype, &mut rng, tenth),
                    changed([k, d], dtype, &mut rng, most),
                    changed([k, d], dtype, &mut rng, each),
                ];
                for (x, c) in [(&x, 0), (&one, 0), (&x, 1), (&some, 1), (&many, 1), (&x, 2), (&many, 2), (&all, 3)] {
                    METRICS.into_iter().for_each(|metric| {
                        check(x, &cs[c], metric, &format!("outliers {factor:e}, centroids {c}, k {k}"))
                    });
                }
            }
        }
    }
}

#[test]
fn near_ties_beside_an_outlier_are_settled_exactly() {
    let mut rng = rng(302);
    for dtype in DTYPES {
        for (offset, far) in [(0.0, 1e4), (100.0, 6e4), (1000.0, 3e4), (0.0, largest(dtype) / 2.0)] {
            let (d, k) = (9, 48);
            // Pairs of centroids that differ in the last digit of one column, and rows between and on them.
            let base = uniform(&[k / 2, d], offset, 1.0, dtype, &mut rng);
            let values = f64s(&base);
            let twin = tensor(&[k / 2, d], dtype, |i| {
                values[i] + if i % d == i / d % d { ulp(values[i], dtype) } else { 0.0 }
            });
            let outlier = uniform(&[2, d], far, far / 2.0, dtype, &mut rng);
            let c = Tensor::cat(&[&twin, &outlier, &base, &twin], 0).unwrap();
            let x =
                Tensor::cat(&[&base, &twin, &uniform(&[50, d], offset, 1.0, dtype, &mut rng), &outlier], 0).unwrap();
            METRICS.into_iter().for_each(|metric| check(&x, &c, metric, &format!("near-ties at {offset}")));
        }
    }
}

#[test]
fn centroids_that_are_no_numbers_are_nearest_to_nothing() {
    let mut rng = rng(303);
    let bad = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY];
    for [n, k, d] in SHAPES {
        for dtype in DTYPES {
            let x = uniform(&[n, d], 0.0, 1.0, dtype, &mut rng);
            for (b, value) in bad.into_iter().enumerate() {
                for every in [k, 7, 2, 1] {
                    let c = f64s(&uniform(&[k, d], 0.0, 1.0, dtype, &mut rng));
                    let c =
                        tensor(
                            &[k, d],
                            dtype,
                            |i| if i / d % every == b % every && i % d == d / 2 { value } else { c[i] },
                        );
                    METRICS
                        .into_iter()
                        .for_each(|metric| check(&x, &c, metric, &format!("one of {every} is {value}, k {k}")));
                }
            }
            // All kinds at once, and the first of two equal ones later than either.
            let c = f64s(&uniform(&[k, d], 0.0, 1.0, dtype, &mut rng));
            let c =
                tensor(&[k, d], dtype, |i| if i / d < 9 && i % d == 0 { bad[i / d % 3] } else { c[i % (k / 2 * d)] });
            METRICS.into_iter().for_each(|metric| check(&x, &c, metric, "all kinds"));
        }
    }
}

#[test]
fn rows_that_are_no_numbers_are_as_far_from_all_centroids() {
    let mut rng = rng(304);
    for [n, k, d] in SHAPES {
        for dtype in DTYPES {
            let x = f64s(&uniform(&[n, d], 0.0, 1.0, dtype, &mut rng));
            let bad = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 0.0, -0.0];
            let x = tensor(&[n, d], dtype, |i| {
                let row = i / d;
                match row % 4 {
                    0 if i % d == row / 20 % d => bad[row / 4 % 5],
                    1 if row % 8 == 1 => bad[3 + row / 8 % 2],
                    2 if i % d < 2 => bad[1 + (row / 4 + i % d) % 2],
                    _ => x[i],
                }
            });
            for offset in [0.0, 2.0] {
                let c = uniform(&[k, d], offset, 1.0, dtype, &mut rng);
                METRICS
                    .into_iter()
                    .for_each(|metric| check(&x, &c, metric, &format!("rows, centroids around {offset}")));
            }
        }
    }
}

#[test]
fn numbers_next_to_nothing_and_next_to_infinity_are_exact() {
    let mut rng = rng(305);
    for [n, k, d] in SHAPES {
        for dtype in DTYPES {
            let tiny = match dtype {
                DType::F16 => 1e-6,
                DType::F64 => 1e-310,
                _ => 1e-39,
            };
            for (rows, centroids) in
                [(tiny, tiny), (tiny, 1.0), (1.0, tiny), (1.0, largest(dtype)), (largest(dtype), 1.0)]
            {
                let x = changed([n, d], dtype, &mut rng, |_, row| scaled(row, rows));
                let c =
                    changed([k, d], dtype, &mut rng, |i, row| scaled(row, if i % 3 == 0 { rows } else { centroids }));
                METRICS
                    .into_iter()
                    .for_each(|metric| check(&x, &c, metric, &format!("rows by {rows:e}, centroids by {centroids:e}")));
            }
            let x = changed([n, d], dtype, &mut rng, |_, row| scaled(row, largest(dtype)));
            let c = changed([k, d], dtype, &mut rng, |_, row| scaled(row, largest(dtype)));
            METRICS.into_iter().for_each(|metric| check(&x, &c, metric, "the largest numbers"));
        }
    }
}

/// A process that is out of memory ends, unless it asks whether there is any.
#[test]
fn memory_that_the_host_does_not_have_is_refused() {
    let x = Tensor::zeros((1, 1, 1), DType::F32, &Device::Cpu).unwrap().broadcast_as((1 << 20, 1 << 30, 1)).unwrap();
    let c = Tensor::zeros((2, 1), DType::F32, &Device::Cpu).unwrap();
    let labels = Tensor::zeros((1, 1), DType::U32, &Device::Cpu).unwrap().broadcast_as((1 << 20, 1 << 30)).unwrap();
    let (few, label) = (ones(&[4, 1 << 20], DType::F32, &Device::Cpu), labels.narrow(0, 0, 1).unwrap().narrow(1, 0, 4));
    let refused = [
        assign(&x, &c, Metric::SquaredEuclidean).err(),
        assign_with_distances(&x, &c, Metric::Manhattan).err(),
        quantize(&x, &c, Metric::Dot).err(),
        sort_by_cluster(&labels, 2).err(),
        cluster_sums(&few, &label.unwrap().squeeze(0).unwrap(), u32::MAX as usize - 1).err(),
        KMeans::new(2).fit(&x).err(),
    ];
    for (i, error) in refused.into_iter().enumerate() {
        assert!(matches!(&error, Some(Error::OutOfMemory { bytes, .. }) if *bytes > 1 << 50), "{i}: {error:?}");
    }
}

/// The centroids that the CPU compares by the definition while it does `f`.
fn compared(f: impl FnOnce()) -> usize {
    let before = testing::compared();
    f();
    (testing::compared() - before) as usize
}

/// These cost 38 to 370 times as much if one bound serves all centroids: each of these would compare every row with all of
/// them, and may compare few rows with few.
#[test]
fn no_centroid_makes_others_be_compared() {
    let ([n, k, d], mut rng) = ([400, 100, 24], rng(306));
    for dtype in DTYPES {
        let x = uniform(&[n, d], 0.0, 1.0, dtype, &mut rng);
        let plain = uniform(&[k, d], 0.0, 1.0, dtype, &mut rng);
        let with = |row: Tensor, at: usize| {
            Tensor::cat(&[plain.narrow(0, 0, at).unwrap(), row, plain.narrow(0, at, k - at).unwrap()], 0).unwrap()
        };
        let row = |value: f64| tensor(&[1, d], dtype, |i| if i % 3 == 0 { value } else { 0.5 });
        let mut kinds = vec![("none".to_string(), plain.clone())];
        for far in [3e3, 6e4, 1e10, 1e17, 1e19, 1e30, -3e38] {
            let far = f64::clamp(far, -largest(dtype), largest(dtype));
            kinds.extend([0, k / 2, k].map(|at| (format!("{far:e} at {at}"), with(row(far), at))));
        }
        kinds.extend([f64::NAN, f64::INFINITY].map(|bad| (format!("{bad}"), with(row(bad), 7))));
        kinds.push(("every one twice".into(), Tensor::cat(&[&plain, &plain], 0).unwrap()));
        kinds.push((
            "two hundred copies".into(),
            Tensor::cat(&[&plain, &row(0.25).repeat((200, 1)).unwrap()], 0).unwrap(),
        ));
        kinds.push((
            "zeros of both signs".into(),
            tensor(&[k, d], dtype, |i| if i % 7 < i / d % 7 { 0.0 } else { -0.0 }),
        ));
        for metric in METRICS {
            for (what, c) in &kinds {
                let found = compared(|| drop(assign(&x, c, metric).unwrap()));
                // By inner products an infinite or overflowing centroid is worth a look for each row.
                assert!(found <= 2 * n + n / 4, "{what}, {metric:?} {dtype:?}: {found} comparisons for {n} rows");
                check(&x.narrow(0, 0, 50).unwrap(), c, metric, what);
            }
        }
    }
}

#[test]
fn rows_of_no_direction_or_no_number_are_compared_with_few() {
    let ([n, k, d], mut rng) = ([400, 100, 24], rng(307));
    for dtype in DTYPES {
        let c = uniform(&[k, d], 0.0, 1.0, dtype, &mut rng);
        for value in [0.0, -0.0, 0.5, f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            let x = tensor(&[n, d], dtype, |_| value);
            for metric in METRICS {
                let found = compared(|| drop(assign(&x, &c, metric).unwrap()));
                assert!(found <= 4 * n, "rows of {value}, {metric:?} {dtype:?}: {found} comparisons for {n} rows");
            }
        }
    }
}

/// scikit-learn#10087 asks what to do with outliers that k-means++ picks; here they are no more than centroids far away.
#[test]
fn a_fit_beside_outliers_compares_as_few_as_any() {
    let ([n, k, d], mut rng) = ([800, 40, 8], rng(308));
    for dtype in DTYPES {
        for metric in [Metric::SquaredEuclidean, Metric::Manhattan] {
            for (far, outliers) in [(1.0, 0), (1e3, 1), (1e4, 1), (1e10, 1), (1e30, 1), (1e4, 5)] {
                let far = f64::min(far, largest(dtype) / 2.0);
                let x = changed([n, d], dtype, &mut rng, |i, row| scaled(row, if i < outliers { far } else { 1.0 }));
                for init in [Init::KMeansPlusPlus, Init::KMeansParallel, Init::Even] {
                    let settings = KMeans::new(k).max_iters(5).tol(0.0).metric(metric).init(init.clone());
                    let found = compared(|| drop(settings.fit(&x).unwrap()));
                    // In each of six assignments, of which the proof leaves few rows open.
                    assert!(
                        found <= 6 * n,
                        "{outliers} at {far:e}, {init:?} {metric:?} {dtype:?}: {found} for {n} rows"
                    );
                }
            }
        }
        let equal = tensor(&[n, d], dtype, |i| (i % d) as f64);
        let found = compared(|| drop(KMeans::new(k).max_iters(5).fit(&equal).unwrap()));
        assert!(found <= n, "equal rows, {dtype:?}: {found} comparisons for {n} rows");
    }
}
