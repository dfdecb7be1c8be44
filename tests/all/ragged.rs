//! Problems of different sizes in one tensor: padding does not count, whatever it holds.

use crate::common::*;
use candle_core::{DType, Device, Tensor};
use candle_flash_kmeans::{EmptyClusters, Error, Fit, Init, KMeans, Metric};

const LENGTHS: [u32; 3] = [130, 7, 200];

fn lengths(device: &Device) -> Tensor {
    Tensor::new(&LENGTHS, device).unwrap()
}

/// Problems of 200 rows, of which the first ones count; the others are `padding`.
fn ragged(d: usize, dtype: DType, padding: f64) -> Tensor {
    let x = blobs(&[3, 200, d], 6, dtype, &mut rng(91));
    let v = f64s(&x);
    let counts = |i: usize| i / d % 200 < LENGTHS[i / d / 200] as usize;
    tensor(&[3, 200, d], dtype, |i| if counts(i) { v[i] } else { padding })
}

/// Problem `b` of a batch is what that problem is alone.
#[track_caller]
fn same_as_alone(batch: &Fit, b: usize, alone: &Fit, what: &str) {
    let of = |t: &Tensor| t.get(b).unwrap();
    assert_same(&of(&batch.centroids), &alone.centroids, &format!("{what}: centroids"));
    assert_same(
        &of(&batch.labels).narrow(0, 0, LENGTHS[b] as usize).unwrap(),
        &alone.labels,
        &format!("{what}: labels"),
    );
    assert_same(&of(&batch.counts), &alone.counts, &format!("{what}: counts"));
    assert_same(&of(&batch.inertia), &alone.inertia, &format!("{what}: inertia"));
    assert_same(&of(&batch.n_iter), &alone.n_iter, &format!("{what}: n_iter"));
}

#[test]
fn problems_are_what_they_are_alone() {
    for (dtype, metric) in DTYPES.into_iter().flat_map(|t| METRICS.map(|m| (t, m))) {
        for padding in [0.0, 60_000.0, f64::NAN, f64::NEG_INFINITY] {
            let x = ragged(5, dtype, padding);
            for (settings, problems) in [
                (KMeans::new(7).init(Init::Even), 0..3),
                (KMeans::new(7).init(Init::Even).tol(0.0).empty_clusters(EmptyClusters::Relocate), 0..3),
                (KMeans::new(4).init(Init::Even).tol(1e-2), 0..3),
                // Draws belong to a problem's place in the batch.
                (KMeans::new(5).n_init(2), 0..1),
                (KMeans::new(5).init(Init::KMeansPlusPlus), 0..1),
                (KMeans::new(5).init(Init::KMeansParallel), 0..1),
            ] {
                let settings = settings.metric(metric);
                for device in devices() {
                    let what = format!("{metric:?} {dtype:?} {padding} on {:?}", device.location());
                    let x = x.to_device(&device).unwrap();
                    let fit = settings.clone().lengths(&lengths(&device)).fit(&x).unwrap();
                    assert!(u32s(&fit.labels).into_iter().all(|l| (l as usize) < fit.counts.dims()[1]), "{what}");
                    assert!(f64s(&fit.centroids).into_iter().all(f64::is_finite), "{what}");
                    for b in problems.clone() {
                        let rows = x.get(b).unwrap().narrow(0, 0, LENGTHS[b] as usize).unwrap();
                        same_as_alone(&fit, b, &settings.fit(&rows).unwrap(), &what);
                    }
                }
            }
        }
    }
}

/// No start takes a row of padding, even where it takes all others.
#[test]
fn padding_is_never_a_seed() {
    let x = ragged(3, DType::F32, 1e6);
    for device in devices() {
        let x = x.to_device(&device).unwrap();
        for init in [Init::Random, Init::KMeansPlusPlus, Init::KMeansParallel, Init::Even] {
            for seed in 0..5 {
                let start = KMeans::new(7).init(init.clone()).seed(seed).max_iters(0).lengths(&lengths(&device));
                let weights = tensor(&[200], DType::F32, |i| (i % 3) as f64).to_device(&device).unwrap();
                for settings in [start.clone(), start.sample_weights(&weights)] {
                    let fit = settings.fit(&x).unwrap();
                    assert!(f64s(&fit.centroids).into_iter().all(|v| v < 1e3), "{init:?} {seed}");
                }
            }
        }
    }
}

/// Weights and lengths together, prepared once and run twice, in a layout of its own.
#[test]
fn lengths_go_with_weights_views_and_prepared_fits() {
    for device in devices() {
        let x = ragged(4, DType::F32, f64::NAN).to_device(&device).unwrap();
        let weights = uniform(&[3, 200], 1.0, 1.0, DType::F32, &mut rng(92)).to_device(&device).unwrap();
        for metric in METRICS {
            let settings = KMeans::new(5).metric(metric).init(Init::Even).max_iters(6);
            let both = settings.clone().sample_weights(&weights).lengths(&lengths(&device));
            let fit = both.fit(&x).unwrap();
            let turned = x.transpose(0, 1).unwrap().contiguous().unwrap().transpose(0, 1).unwrap();
            assert_same_fit(&both.fit(&turned).unwrap(), &fit, "turned");
            for (b, length) in LENGTHS.into_iter().enumerate() {
                let counted = |t: Tensor| t.get(b).unwrap().narrow(0, 0, length as usize).unwrap();
                let alone =
                    settings.clone().sample_weights(&counted(weights.clone())).fit(&counted(x.clone())).unwrap();
                same_as_alone(&fit, b, &alone, &format!("{metric:?}"));
            }
            let mut prepared = both.prepare((3, 200, 4), DType::F32, &device).unwrap();
            prepared.run(&turned).unwrap();
            prepared.run(&x).unwrap();
            assert_same_fit(&prepared.into_fit().unwrap(), &fit, "prepared");
        }
    }
}

#[test]
fn lengths_that_do_not_fit_are_refused() {
    for device in devices() {
        let x = ones(&[3, 9, 2], DType::F32, &device);
        let refused = |lengths: Tensor, says: &str| {
            let error = KMeans::new(4).lengths(&lengths).fit(&x).unwrap_err();
            assert!(error.to_string().contains(says), "{error} lacks {says}");
            error
        };
        let of = |v: &[u32]| Tensor::new(v, &device).unwrap();
        let range = |v: &[u32], says: &str| assert!(matches!(refused(of(v), says), Error::Range { .. }));
        range(&[4, 3, 9], "lengths: 3 is outside 4..=9");
        range(&[4, 9, 10], "lengths: 10 is outside 4..=9");
        assert!(matches!(refused(of(&[4, 9]), "lengths: shape [2], expected [3]"), Error::Shape { .. }));
        assert!(matches!(refused(ones(&[3], DType::F32, &device), "lengths: dtype F32"), Error::DType { .. }));
        // Only rows that count are searched; and some weight has to count.
        let bad = tensor(&[3, 9, 2], DType::F32, |i| if i == 9 * 2 + 8 { f64::NAN } else { 1.0 });
        let bad = bad.to_device(&device).unwrap();
        let error = KMeans::new(4).lengths(&of(&[4, 5, 9])).fit(&bad).unwrap_err();
        assert!(matches!(error, Error::NonFinite { argument: "x", batch: 1, row: 4 }), "{error}");
        KMeans::new(4).lengths(&of(&[4, 4, 9])).fit(&bad).unwrap();
        let late = tensor(&[9], DType::F32, |i| (i > 4) as u8 as f64).to_device(&device).unwrap();
        let error = KMeans::new(4).sample_weights(&late).lengths(&of(&[9, 5, 9])).fit(&x).unwrap_err();
        assert!(matches!(error, Error::Value { argument: "sample_weights total", .. }), "{error}");
    }
}

/// One problem without a batch has one length, of no dimensions.
#[test]
fn one_problem_has_one_length() {
    for device in devices() {
        let x = tensor(&[6, 1], DType::F64, |i| [1.0, 2.0, 9.0, 10.0, f64::NAN, 77.0][i]).to_device(&device).unwrap();
        let settings = KMeans::new(2).init(Init::Even).metric(Metric::Manhattan);
        let fit = settings.lengths(&Tensor::new(4u32, &device).unwrap()).fit(&x).unwrap();
        assert_eq!((f64s(&fit.centroids), u32s(&fit.counts)), (vec![1.0, 9.0], vec![2, 2]));
        assert_eq!(f64s(&fit.inertia), [2.0]);
    }
}
