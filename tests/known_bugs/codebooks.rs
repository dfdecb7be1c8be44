//! Codebooks, running means and their updates.

use super::common::*;
use candle_core::{DType, Device, Module, Tensor, Var};
use candle_flash_kmeans::{
    nn::{Codebook, Ema, EmaCodebook, GainShapeQuantizer, ProductQuantizer, ResidualQuantizer},
    Error, Init, KMeans, Metric, MiniBatch, Segments,
};
use std::sync::{
    atomic::{AtomicBool, Ordering},
    Arc,
};

const RUNNING: [Metric; 3] = [Metric::SquaredEuclidean, Metric::Cosine, Metric::Dot];

fn rows(values: &[[f64; 3]], dtype: DType, device: &Device) -> Tensor {
    tensor(&[values.len(), 3], dtype, |i| values[i / 3][i % 3]).to_device(device).unwrap()
}

/// `x` `(n, 3)` with rows that say nothing before, between and after its own.
fn salted(x: &Tensor, metric: Metric) -> Tensor {
    let huge = if matches!(x.dtype(), DType::F16) { 6e4 } else { 1e30 };
    let (nan, inf) = (f64::NAN, f64::INFINITY);
    let mut silent = vec![[nan; 3], [huge, nan, -huge], [inf, 1.0, 2.0], [-inf, inf, 0.0]];
    if metric == Metric::Cosine {
        silent.extend([[0.0; 3], [-0.0; 3]]);
    }
    let (silent, n) = (rows(&silent, x.dtype(), x.device()), x.dims()[0]);
    let parts = [&silent, &x.narrow(0, 0, n / 3).unwrap(), &silent, &x.narrow(0, n / 3, n - n / 3).unwrap(), &silent];
    Tensor::cat(&parts, 0).unwrap()
}

/// The rows of [`salted`]'s result that are those of `x`.
fn own(salted: usize, n: usize) -> Vec<bool> {
    let silent = (salted - n) / 3;
    (0..salted).map(|i| i >= silent && (i < silent + n / 3 || i >= 2 * silent + n / 3) && i < salted - silent).collect()
}

/// sonnet and vector-quantize-pytorch: the smoothing's `eps` pulls an entry without rows to the origin.
#[test]
fn entries_without_rows_stay_where_they_are() {
    for (device, dtype) in devices().into_iter().flat_map(|device| DTYPES.map(|t| (device.clone(), t))) {
        for (decay, eps) in
            [(0.0, 1e-5), (0.8, 1e-5), (0.8, 0.0), (0.99, 1e3), (0.5, f64::MAX), (1.0, 1e-5), (0.8, 1.0)]
        {
            for metric in RUNNING {
                // Entry 1 is farthest from all rows by each metric.
                let start = rows(&[[4.0, 1.0, 0.5], [-100.0, -30.0, 7.0]], dtype, &device);
                let x = rows(&[[4.0, 1.0, 1.0], [3.0, 2.0, 0.5], [5.0, 1.0, 0.0]], dtype, &device);
                let what = format!("{dtype:?} {metric:?} decay {decay} eps {eps}");
                let settings = Ema { decay, eps, ..Ema::default() };
                let mut ema = EmaCodebook::new(Codebook::new(&start, metric).unwrap(), settings).unwrap();
                // Past the number of steps in which 0.5 and 0.8 leave nothing of an f64.
                let long = dtype == DType::F16 && metric == Metric::SquaredEuclidean && eps == 0.0;
                let steps = if long { 4000 } else { 40 };
                for _ in 0..steps {
                    assert_eq!(u32s(&ema.step(&x).unwrap().codes), [0; 3], "{what}");
                }
                let now = ema.codebook().centroids();
                assert_same(&now.get(1).unwrap(), &start.get(1).unwrap(), &what);
                assert!(f64s(now).iter().all(|v| v.is_finite()), "{what}: {now}");
                if decay == 1.0 {
                    assert_same(now, &start, &format!("{what}: nothing is learned"));
                }
                // It follows its rows when they come.
                let late = rows(&[[-50.0, -20.0, 7.0]], dtype, &device);
                assert_eq!(u32s(&ema.step(&late).unwrap().codes), [1], "{what}");
                let moved = f64s(&ema.codebook().centroids().get(1).unwrap());
                assert!(moved.iter().all(|v| v.is_finite()) && moved.iter().any(|v| *v != 0.0), "{what}: {moved:?}");
                if long {
                    approx::assert_relative_eq!(moved[0], -50.0, max_relative = 1e-3);
                }
            }
        }
    }
}

/// The report's numbers: 58.8 after 50 steps, 0.18 after 80.
#[test]
fn an_entry_at_100_stays_at_100() {
    for device in devices() {
        let start = Tensor::new(&[[1f32], [100.]], &device).unwrap();
        let codebook = Codebook::new(&start, Metric::SquaredEuclidean).unwrap();
        let mut ema = EmaCodebook::new(codebook, Ema::default()).unwrap();
        let x = Tensor::new(&[[0f32], [1.], [2.]], &device).unwrap();
        for _ in 0..200 {
            ema.step(&x).unwrap();
        }
        assert_eq!(f64s(&ema.codebook().centroids().get(1).unwrap()), [100.0]);
        assert!((f64s(ema.codebook().centroids())[0] - 1.0).abs() < 1e-4, "its neighbour is the mean of its rows");
    }
}

/// A first mean replaces a centroid, however far away that is.
#[test]
fn first_rows_replace_a_centroid_far_away() {
    for (device, dtype) in
        devices().into_iter().flat_map(|device| [DType::F32, DType::F64].map(|t| (device.clone(), t)))
    {
        let start = rows(&[[1e30, -1e30, 1e30]], dtype, &device);
        let mut running = MiniBatch::new(&start, Metric::SquaredEuclidean).unwrap();
        running.step(&rows(&[[1.0, 2.0, 3.0], [2.0, 2.0, 5.0]], dtype, &device)).unwrap();
        assert_eq!(f64s(&running.centroids().unwrap()), [1.5, 2.0, 4.0]);
    }
}

#[test]
fn rows_that_say_nothing_weigh_nothing_in_steps() {
    let mut rng = rng(301);
    for (device, dtype) in devices().into_iter().flat_map(|device| DTYPES.map(|t| (device.clone(), t))) {
        for metric in RUNNING {
            let what = format!("{dtype:?} {metric:?}");
            let start = Codebook::new(&uniform(&[6, 3], 0.0, 3.0, dtype, &mut rng).to_device(&device).unwrap(), metric)
                .unwrap();
            for threshold in [0.0, 2.5] {
                let settings = Ema { threshold_ema_dead_code: threshold, ..Ema::default() };
                let mut clean = EmaCodebook::new(start.clone(), settings).unwrap();
                let mut other = clean.clone();
                for _ in 0..6 {
                    let x = uniform(&[30, 3], 0.5, 3.0, dtype, &mut rng).to_device(&device).unwrap();
                    let bad = salted(&x, metric);
                    let (a, b) = (clean.step(&x).unwrap(), other.step(&bad).unwrap());
                    let codes = u32s(&b.codes);
                    assert!(codes.iter().all(|&code| code < 6), "{what}: codes in range");
                    let own = own(bad.dims()[0], 30);
                    let of_x: Vec<_> = codes.iter().zip(&own).filter_map(|(&code, &own)| own.then_some(code)).collect();
                    assert_eq!(of_x, u32s(&a.codes), "{what}");
                    assert!(f64s(&b.values).iter().all(|v| v.is_finite()), "{what}: values are entries");
                    assert_same(&b.usage.codes_used, &a.usage.codes_used, &what);
                    assert_same(&b.usage.perplexity, &a.usage.perplexity, &what);
                    assert_same(other.codebook().centroids(), clean.codebook().centroids(), &what);
                    assert_same(&other.cluster_size().unwrap(), &clean.cluster_size().unwrap(), &what);
                    approx::assert_relative_eq!(f64s(&b.loss)[0], f64s(&a.loss)[0], max_relative = 1e-5);
                }
            }
            let mut clean = MiniBatch::new(start.centroids(), metric).unwrap();
            let mut other = clean.clone();
            for _ in 0..3 {
                let x = uniform(&[30, 3], 0.5, 3.0, dtype, &mut rng).to_device(&device).unwrap();
                clean.step(&x).unwrap();
                other.step(&salted(&x, metric)).unwrap();
                assert_same(&other.centroids().unwrap(), &clean.centroids().unwrap(), &what);
                assert_same(other.counts(), clean.counts(), &what);
            }
        }
    }
}

/// Nothing to learn from: nothing changes, and a loss of nothing is 0.
#[test]
fn batches_that_say_nothing_change_nothing() {
    for device in devices() {
        let start = rows(&[[4.0, 1.0, 0.5], [-2.0, 3.0, 7.0]], DType::F32, &device);
        let x = rows(&[[f64::NAN, 1.0, 2.0], [f64::INFINITY, 0.0, 0.0]], DType::F32, &device);
        for metric in RUNNING {
            let codebook = Codebook::new(&start, metric).unwrap();
            let settings = Ema { threshold_ema_dead_code: 3.0, ..Ema::default() };
            let mut ema = EmaCodebook::new(codebook.clone(), settings).unwrap();
            let out = ema.step(&x).unwrap();
            assert_eq!(
                (f64s(&out.loss), f64s(&out.usage.perplexity), u32s(&out.usage.codes_used)),
                (vec![0.0], vec![0.0], vec![0])
            );
            assert_same(ema.codebook().centroids(), &start, "entries");
            assert_eq!(f64s(&codebook.commitment_loss(&x).unwrap()), [0.0]);
            let mut running = MiniBatch::new(&start, metric).unwrap();
            let before = running.centroids().unwrap();
            running.step(&x).unwrap();
            assert_same(&running.centroids().unwrap(), &before, "means");
            assert_eq!(f64s(running.counts()), [0.0, 0.0]);
        }
    }
}

#[test]
fn no_gradient_comes_from_rows_that_say_nothing() {
    for device in devices() {
        let codebook = Codebook::new(&rows(&[[1.0, 0.0, 0.0]], DType::F32, &device), Metric::SquaredEuclidean).unwrap();
        let x = rows(&[[f64::NAN, 1.0, 2.0], [3.0, 0.0, 0.0], [f64::INFINITY, 0.0, 0.0]], DType::F32, &device);
        let x = Var::from_tensor(&x).unwrap();
        let rq = ResidualQuantizer::new(vec![codebook.clone()]).unwrap();
        let mut ema = EmaCodebook::new(codebook.clone(), Ema::default()).unwrap();
        let losses =
            [codebook.commitment_loss(&x).unwrap(), rq.commitment_loss(&x).unwrap(), ema.step(&x).unwrap().loss];
        for loss in losses {
            let grad = f64s(loss.backward().unwrap().get(&x).unwrap());
            let want = [0.0, 0.0, 0.0, 4.0 / 3.0, 0.0, 0.0, 0.0, 0.0, 0.0];
            grad.iter().zip(want).for_each(|(got, want)| approx::assert_abs_diff_eq!(*got, want, epsilon = 1e-6));
        }
    }
}

#[test]
fn rows_that_say_nothing_weigh_nothing_in_training() {
    let mut rng = rng(302);
    for (device, dtype) in
        devices().into_iter().flat_map(|device| [DType::F16, DType::F64].map(|t| (device.clone(), t)))
    {
        for metric in METRICS {
            let x = uniform(&[60, 3], 0.5, 3.0, dtype, &mut rng).to_device(&device).unwrap();
            let bad = salted(&x, metric);
            for init in [Init::Random, Init::KMeansPlusPlus, Init::KMeansParallel, Init::Even] {
                let what = format!("{dtype:?} {metric:?} {init:?}");
                let kmeans = KMeans::new(5).metric(metric).init(init).check_finite(false);
                let train = |x: &Tensor| Codebook::train(x, &kmeans).unwrap();
                assert_same(train(&bad).centroids(), train(&x).centroids(), &what);
                let train = |x: &Tensor| ProductQuantizer::train(x, 3, &kmeans).unwrap();
                assert_same(train(&bad).codebook().centroids(), train(&x).codebook().centroids(), &what);
                let train = |x: &Tensor| ResidualQuantizer::train(x, 2, &kmeans).unwrap();
                for (a, b) in train(&bad).stages().iter().zip(train(&x).stages()) {
                    assert_same(a.centroids(), b.centroids(), &what);
                }
                if metric == Metric::Manhattan {
                    continue;
                }
                let train = |x: &Tensor| EmaCodebook::train(x, &kmeans, Ema::default()).unwrap();
                assert_same(train(&bad).codebook().centroids(), train(&x).codebook().centroids(), &what);
                assert_same(&train(&bad).cluster_size().unwrap(), &train(&x).cluster_size().unwrap(), &what);
                let train = |x: &Tensor| MiniBatch::train(x, &kmeans).unwrap();
                assert_same(&train(&bad).centroids().unwrap(), &train(&x).centroids().unwrap(), &what);
                assert_same(train(&bad).counts(), train(&x).counts(), &what);
            }
            // Rows of zeros are lengths to the gains, so that only what is not finite is left out here.
            let bad = salted(&x, Metric::SquaredEuclidean);
            let kmeans = KMeans::new(4).check_finite(false);
            let train = |x: &Tensor| GainShapeQuantizer::train(x, &kmeans, &kmeans).unwrap();
            assert_same(train(&bad).shapes().centroids(), train(&x).shapes().centroids(), "shapes");
            assert_same(train(&bad).gains().centroids(), train(&x).gains().centroids(), "gains");
        }
    }
}

/// Weights go with their rows, and problems of a batch have their own rows that say nothing.
#[test]
fn weights_and_batches_keep_their_rows() {
    let mut rng = rng(303);
    for device in devices() {
        let x = uniform(&[2, 40, 3], 0.5, 3.0, DType::F32, &mut rng).to_device(&device).unwrap();
        let w = uniform(&[2, 40], 2.0, 1.0, DType::F32, &mut rng).to_device(&device).unwrap();
        let nan = rows(&[[f64::NAN; 3]; 40], DType::F32, &device);
        let mixed = Tensor::cat(
            &[
                &x.get(0).unwrap(),
                &nan,
                &nan.narrow(0, 0, 7).unwrap(),
                &x.get(1).unwrap(),
                &nan.narrow(0, 0, 33).unwrap(),
            ],
            0,
        );
        let mixed = mixed.unwrap().reshape((2, 80, 3)).unwrap();
        let ones = ones(&[40], DType::F32, &device);
        let weights = Tensor::cat(
            &[
                &w.get(0).unwrap(),
                &ones,
                &ones.narrow(0, 0, 7).unwrap(),
                &w.get(1).unwrap(),
                &ones.narrow(0, 0, 33).unwrap(),
            ],
            0,
        );
        let weights = weights.unwrap().reshape((2, 80)).unwrap();
        let start = x.narrow(1, 0, 4).unwrap().contiguous().unwrap();
        let kmeans = |w: &Tensor| KMeans::new(4).init(Init::Given(start.clone())).sample_weights(w).check_finite(false);
        let got = EmaCodebook::train(&mixed, &kmeans(&weights), Ema::default()).unwrap();
        let want = EmaCodebook::train(&x, &kmeans(&w), Ema::default()).unwrap();
        assert_same(got.codebook().centroids(), want.codebook().centroids(), "entries");
        assert_same(&got.cluster_size().unwrap(), &want.cluster_size().unwrap(), "weights");
        approx::assert_relative_eq!(
            sum(f64s(&got.cluster_size().unwrap()).into_iter()),
            sum(f64s(&w).into_iter()),
            max_relative = 1e-12
        );
        // The batch's own lengths still hold.
        let lengths = Tensor::new(&[80u32, 47], &device).unwrap();
        let cut = EmaCodebook::train(&mixed, &kmeans(&weights).lengths(&lengths), Ema::default()).unwrap();
        assert_same(cut.codebook().centroids(), got.codebook().centroids(), "padding that says nothing either");
    }
}

/// A refusal names its own row.
#[test]
fn rows_that_say_nothing_are_refused_where_that_is_asked_for() {
    for device in devices() {
        let mut values = vec![[1.0, 2.0, 3.0]; 9];
        values[2] = [0.0; 3];
        values[5][1] = f64::NAN;
        let x = rows(&values, DType::F32, &device);
        let kmeans = KMeans::new(2);
        let trained = [
            Codebook::train(&x, &kmeans.clone().metric(Metric::Cosine)).map(drop),
            ResidualQuantizer::train(&x, 2, &kmeans).map(drop),
            ResidualQuantizer::train(&x, 2, &kmeans.clone().metric(Metric::Cosine)).map(drop),
            GainShapeQuantizer::train(&x, &kmeans, &kmeans).map(drop),
            EmaCodebook::train(&x, &kmeans, Ema::default()).map(drop),
            MiniBatch::train(&x, &kmeans).map(drop),
        ];
        for refused in trained {
            assert!(matches!(refused, Err(Error::NonFinite { argument: "x", batch: 0, row: 5 })), "{refused:?}");
        }
    }
}

/// A head of zeros among others, and fewer rows with a direction than shapes.
#[test]
fn heads_of_zeros_train_and_come_back_as_zeros() {
    let mut rng = rng(304);
    for (device, dtype) in devices().into_iter().flat_map(|device| DTYPES.map(|t| (device.clone(), t))) {
        let x = uniform(&[3, 20, 4], 1.0, 3.0, dtype, &mut rng);
        let mut values = f64s(&x);
        values[80..160].fill(0.0);
        values[172..240].fill(0.0);
        let x = tensor(&[3, 20, 4], dtype, |i| values[i]).to_device(&device).unwrap();
        for init in [Init::Random, Init::KMeansPlusPlus, Init::Even] {
            let kmeans = |k| KMeans::new(k).init(init.clone());
            let quantizer = GainShapeQuantizer::train(&x, &kmeans(6), &kmeans(5)).unwrap();
            for codebook in [quantizer.shapes(), quantizer.gains()] {
                assert!(f64s(codebook.centroids()).iter().all(|v| v.is_finite()), "{dtype:?}");
            }
            assert_eq!(f64s(&quantizer.gains().centroids().get(1).unwrap()), [0.0; 5]);
            let (shapes, gains) = quantizer.encode_u8(&x).unwrap();
            let back = quantizer.decode(&shapes, &gains).unwrap();
            assert_same(&back, &quantizer.forward(&x).unwrap(), "forward");
            assert!(f64s(&back.get(1).unwrap()).iter().all(|v| *v == 0.0), "{dtype:?}: zeros");
            assert!(f64s(&back.get(2).unwrap())[12..].iter().all(|v| *v == 0.0), "{dtype:?}: zeros beside others");
            // The first head knows nothing of the others.
            let alone = GainShapeQuantizer::train(&x.get(0).unwrap(), &kmeans(6), &kmeans(5)).unwrap();
            assert_same(&back.get(0).unwrap(), &alone.forward(&x.get(0).unwrap()).unwrap(), "a head alone");
        }
        // Cosine, whoever trains by it.
        let cosine = KMeans::new(6).metric(Metric::Cosine);
        let codebook = Codebook::train(&x, &cosine).unwrap();
        let norms: Vec<f64> =
            problems(codebook.centroids())[2].iter().map(|row| row.iter().map(|v| v * v).sum()).collect();
        assert!(
            norms.iter().all(|v| *v > 0.9),
            "three rows that have a direction, and no zeros among the entries: {norms:?}"
        );
    }
}

#[test]
fn settings_are_refused_before_a_fit_runs() {
    for device in devices() {
        let x = uniform(&[50, 6], 0.0, 1.0, DType::F32, &mut rng(305)).to_device(&device).unwrap();
        let ran = Arc::new(AtomicBool::new(false));
        let seen = ran.clone();
        let kmeans = KMeans::new(3).on_iteration(move |_| seen.store(true, Ordering::Relaxed));
        let refused = |result: Result<(), Error>, part: &str| {
            let error = result.unwrap_err().to_string();
            assert!(error.contains(part), "{error:?} lacks {part:?}");
            assert!(!ran.load(Ordering::Relaxed), "{error} came after a fit");
        };
        let d = Ema::default();
        let bad = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, -1.0, 2.0];
        for v in bad {
            refused(EmaCodebook::train(&x, &kmeans, Ema { decay: v, ..d }).map(drop), "decay");
        }
        for v in &bad[..4] {
            refused(EmaCodebook::train(&x, &kmeans, Ema { eps: *v, ..d }).map(drop), "eps");
            refused(EmaCodebook::train(&x, &kmeans, Ema { commitment_weight: *v, ..d }).map(drop), "commitment_weight");
            let settings = Ema { threshold_ema_dead_code: *v, ..d };
            refused(EmaCodebook::train(&x, &kmeans, settings).map(drop), "threshold_ema_dead_code");
        }
        refused(EmaCodebook::train(&x, &kmeans, Ema { threshold_ema_dead_code: 1e300, ..d }).map(drop), "1000000");
        refused(EmaCodebook::train(&x, &kmeans.clone().metric(Metric::Manhattan), d).map(drop), "manhattan");
        refused(MiniBatch::train(&x, &kmeans.clone().metric(Metric::Manhattan)).map(drop), "manhattan");
        for k in [0, 51, usize::MAX] {
            refused(GainShapeQuantizer::train(&x, &kmeans, &KMeans::new(k)).map(drop), "k: ");
            refused(Codebook::train(&x, &KMeans::new(k)).map(drop), "k: ");
        }
        for tol in [f64::NAN, -1.0, f64::INFINITY] {
            refused(GainShapeQuantizer::train(&x, &kmeans, &KMeans::new(3).tol(tol)).map(drop), "tol");
        }
        let wrong = Tensor::ones(7, DType::F32, &device).unwrap();
        refused(
            GainShapeQuantizer::train(&x, &kmeans, &KMeans::new(3).sample_weights(&wrong)).map(drop),
            "sample_weights",
        );
        for m in [0, 4, 7, usize::MAX] {
            refused(ProductQuantizer::train(&x, m, &kmeans).map(drop), "6 columns");
        }
        refused(
            ProductQuantizer::train(&x, 2, &kmeans.clone().sample_weights(&wrong)).map(drop),
            "sample_weights: shape [7]",
        );
        for stages in [0, usize::MAX] {
            refused(ResidualQuantizer::train(&x, stages, &kmeans).map(drop), "stages");
        }
        refused(
            ProductQuantizer::train(&ones(&[5, 0], DType::F32, &device), usize::MAX, &kmeans).map(drop),
            "0 columns",
        );
        assert!(Codebook::train(&x, &kmeans).is_ok() && ran.load(Ordering::Relaxed), "the witness sees a fit");
    }
}

#[test]
fn entries_that_are_not_finite_are_refused() {
    for device in devices() {
        for (value, dtype) in
            [f64::NAN, f64::INFINITY, f64::NEG_INFINITY].into_iter().flat_map(|v| DTYPES.map(|t| (v, t)))
        {
            let bad = rows(&[[1.0; 3], [2.0, value, 0.0]], dtype, &device);
            let codebook = Codebook::new(&bad, Metric::SquaredEuclidean);
            assert!(matches!(codebook, Err(Error::NonFinite { argument: "centroids", row: 1, .. })), "{codebook:?}");
            let running = MiniBatch::new(&bad, Metric::Dot);
            assert!(matches!(running, Err(Error::NonFinite { argument: "centroids", row: 1, .. })), "{running:?}");
        }
        let x = uniform(&[9, 3], 0.0, 1.0, DType::F32, &mut rng(309)).to_device(&device).unwrap();
        let start = Init::Given(rows(&[[1.0; 3], [2.0, f64::NAN, 0.0]], DType::F32, &device));
        let trained = Codebook::train(&x, &KMeans::new(2).init(start).check_finite(false));
        assert!(matches!(trained, Err(Error::NonFinite { argument: "init", row: 1, .. })), "{trained:?}");
        // Finite in f32, but not as f16.
        let codebook = Codebook::new(&rows(&[[1e6; 3]], DType::F32, &device), Metric::Dot).unwrap();
        assert!(matches!(codebook.to_dtype(DType::F16), Err(Error::NonFinite { argument: "centroids", .. })));
        assert!(matches!(codebook.to_dtype(DType::U32), Err(Error::DType { argument: "centroids", .. })));
    }
}

/// No rows, and no problems, in views of their own.
#[test]
fn no_rows_go_there_and_back() {
    let mut rng = rng(306);
    for (device, dtype) in devices().into_iter().flat_map(|device| DTYPES.map(|t| (device.clone(), t))) {
        let own = uniform(&[2, 30, 6], 0.0, 1.0, dtype, &mut rng).to_device(&device).unwrap();
        let shared = own.get(0).unwrap();
        for (x, shapes) in [(&shared, vec![vec![0, 6], vec![0, 4, 6], vec![3, 0, 6]]), (&own, vec![vec![2, 0, 6]])] {
            let kmeans = KMeans::new(4);
            let codebook = Codebook::train(x, &kmeans).unwrap();
            let pq = ProductQuantizer::train(x, 2, &kmeans).unwrap();
            let rq = ResidualQuantizer::train(x, 3, &kmeans).unwrap();
            let gs = GainShapeQuantizer::train(x, &kmeans, &kmeans).unwrap();
            for shape in shapes {
                // A part of something larger, that starts anywhere.
                let wide: Vec<_> = shape.iter().map(|s| s + 3).collect();
                let mut view = Tensor::zeros(wide, dtype, &device).unwrap();
                for (dim, size) in shape.iter().enumerate() {
                    view = view.narrow(dim, 2, *size).unwrap();
                }
                let mut views = vec![view, ones(&shape, dtype, &device)];
                if device.is_cpu() {
                    // Candle copies nothing of no bytes on a GPU.
                    views.push(Var::from_tensor(&views[1]).unwrap().as_tensor().clone());
                }
                for x in &views {
                    let batch = &shape[..shape.len() - 1];
                    let what = format!("{shape:?} of {dtype:?}");
                    let codes = |codes: &Tensor, tail: &[usize], dtype: DType| {
                        assert_eq!((codes.dims(), codes.dtype()), (&[batch, tail].concat()[..], dtype), "{what}");
                    };
                    let values = |t: Tensor| assert_eq!((t.dims(), t.dtype()), (&shape[..], dtype), "{what}");
                    codes(&codebook.encode(x).unwrap(), &[], DType::U32);
                    codes(&pq.encode(x).unwrap(), &[2], DType::U32);
                    codes(&rq.encode(x).unwrap(), &[3], DType::U32);
                    codes(&codebook.encode_u8(x).unwrap(), &[], DType::U8);
                    codes(&pq.encode_u8(x).unwrap(), &[2], DType::U8);
                    codes(&rq.encode_u8(x).unwrap(), &[3], DType::U8);
                    let (shapes, gains) = gs.encode_u8(x).unwrap();
                    codes(&shapes, &[], DType::U8);
                    codes(&gains, &[], DType::U8);
                    values(codebook.decode(&codebook.encode(x).unwrap()).unwrap());
                    values(pq.decode(&pq.encode_u8(x).unwrap()).unwrap());
                    values(rq.decode(&rq.encode(x).unwrap()).unwrap());
                    values(rq.decode(&rq.encode_u8(x).unwrap()).unwrap());
                    values(gs.decode(&shapes, &gains).unwrap());
                    let losses = [
                        codebook.commitment_loss(x),
                        pq.commitment_loss(x),
                        rq.commitment_loss(x),
                        gs.commitment_loss(x),
                    ];
                    losses.into_iter().for_each(|loss| assert_eq!(f64s(&loss.unwrap()), [0.0], "{what}"));
                    let layers: [&dyn Module; 4] = [&codebook, &pq, &rq, &gs];
                    layers.into_iter().for_each(|layer| values(layer.forward(x).unwrap()));
                    let usage = codebook.usage(&codebook.encode(x).unwrap()).unwrap();
                    let perplexity = usage.perplexity.elem_count().checked_sub(1).map(|_| f64s(&usage.perplexity));
                    assert!(perplexity.iter().flatten().all(|v| *v == 0.0), "{what}: {perplexity:?}");
                    assert_eq!(usage.codes_used.dims(), &batch[..batch.len() - 1]);
                }
            }
        }
        // Rows that do not fit are refused all the same.
        let none = ones(&[0, 5], dtype, &device);
        let codebook = Codebook::new(&ones(&[4, 6], dtype, &device), Metric::Dot).unwrap();
        let pq = ProductQuantizer::new(Codebook::new(&ones(&[2, 4, 3], dtype, &device), Metric::Dot).unwrap()).unwrap();
        let rq = ResidualQuantizer::new(vec![codebook.clone()]).unwrap();
        let refused = [codebook.encode(&none), pq.encode(&none), rq.encode(&none)];
        refused.into_iter().for_each(|r| assert!(matches!(r, Err(Error::Size { .. })), "{r:?}"));
    }
}

/// Fields of a fit and of segments can be replaced; what does not belong together is refused.
#[test]
fn replaced_fields_are_refused() {
    for device in devices() {
        let x = uniform(&[2, 30, 4], 0.0, 1.0, DType::F32, &mut rng(307)).to_device(&device).unwrap();
        let fit = KMeans::new(3).fit(&x).unwrap();
        let scalar = Tensor::new(1u32, &device).unwrap();
        let wrong = [scalar.clone(), ones(&[2, 9], DType::U32, &device), ones(&[2, 30], DType::F32, &device)];
        for t in &wrong {
            let mut bad = fit.clone();
            bad.counts = t.clone();
            assert!(Segments::from_fit(&bad).is_err() && MiniBatch::from_fit(&bad).is_err());
            let mut bad = fit.clone();
            bad.centroids = t.clone();
            assert!(Segments::from_fit(&bad).is_err() && MiniBatch::from_fit(&bad).is_err());
        }
        let mut bad = fit.clone();
        bad.labels = scalar.clone();
        assert!(Segments::from_fit(&bad).is_err());
        bad.labels = (ones(&[2, 30], DType::U32, &device) * 3.0).unwrap();
        assert!(matches!(Segments::from_fit(&bad), Err(Error::Range { got: 3, .. })));
        let whole = Segments::from_fit(&fit).unwrap();
        for t in &wrong {
            let mut bad = [whole.clone(), whole.clone(), whole.clone(), whole.clone(), whole.clone()];
            bad[0].centroids = t.clone();
            bad[1].labels = t.clone();
            bad[2].counts = t.clone();
            bad[3].order = t.clone();
            bad[4].offsets = t.clone();
            bad.iter_mut().for_each(|bad| assert!(bad.append(&fit).is_err()));
        }
    }
}

/// A change to a tensor changes nothing that was made of it.
#[test]
fn codebooks_are_copies() {
    for (device, dtype) in
        devices().into_iter().flat_map(|device| [DType::F32, DType::F64].map(|t| (device.clone(), t)))
    {
        let start = rows(&[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], dtype, &device);
        let var = Var::from_tensor(&start).unwrap();
        let codebook = Codebook::new(&var, Metric::SquaredEuclidean).unwrap();
        let running = MiniBatch::new(&var, Metric::SquaredEuclidean).unwrap();
        var.set(&start.zeros_like().unwrap()).unwrap();
        assert_same(codebook.centroids(), &start, "entries");
        assert_same(&running.centroids().unwrap(), &start, "means");
    }
}

#[test]
fn settings_at_their_ends_keep_entries_finite() {
    let mut rng = rng(308);
    for (device, dtype) in devices().into_iter().flat_map(|device| DTYPES.map(|t| (device.clone(), t))) {
        let large = if dtype == DType::F16 { 6e4 } else { 1e37 };
        let start = Codebook::new(
            &uniform(&[4, 3], 0.0, large, dtype, &mut rng).to_device(&device).unwrap(),
            Metric::SquaredEuclidean,
        );
        let start = start.unwrap();
        for (decay, eps) in
            [0.0, f64::MIN_POSITIVE, 0.8, 1.0].into_iter().flat_map(|d| [0.0, 1e-300, 1e3, f64::MAX].map(|e| (d, e)))
        {
            for (threshold, seed) in [(0.0, 0), (1e-300, u64::MAX), (u32::MAX as f64, 1)] {
                let settings = Ema { decay, eps, threshold_ema_dead_code: threshold, seed, ..Ema::default() };
                let mut ema = EmaCodebook::new(start.clone(), settings).unwrap();
                for _ in 0..4 {
                    let x = uniform(&[500, 3], 0.0, large, dtype, &mut rng).to_device(&device).unwrap();
                    ema.step(&x).unwrap();
                }
                let finite = |t: &Tensor| f64s(t).iter().all(|v| v.is_finite());
                assert!(
                    finite(ema.codebook().centroids()) && finite(&ema.cluster_size().unwrap()),
                    "{dtype:?} {settings:?}"
                );
            }
        }
        assert_eq!(start.bits_per_value_with_codebook(usize::MAX), 2.0 / 3.0);
    }
}
