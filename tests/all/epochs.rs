//! Mini-batches of a source are the steps that a caller would take through its rows in memory.

use crate::common::*;
use candle_core::{DType, Device, Tensor};
use candle_flash_kmeans::{Epochs, Init, KMeans, Metric, MiniBatch, Source, StreamOptions};

fn assert_same_means(a: &MiniBatch, b: &MiniBatch, what: &str) {
    assert_same(&a.centroids().unwrap(), &b.centroids().unwrap(), what);
    assert_same(a.counts(), b.counts(), what);
}

/// Steps through batches of rows, each from its first row on.
fn by_hand(start: &MiniBatch, x: &Tensor, weights: Option<&Tensor>, batches: &[(usize, usize)]) -> MiniBatch {
    let mut running = start.clone();
    for &(first, rows) in batches {
        let batch = x.narrow(0, first, rows).unwrap();
        match weights {
            Some(weights) => running.step_weighted(&batch, &weights.narrow(0, first, rows).unwrap()).unwrap(),
            None => running.step(&batch).unwrap(),
        };
    }
    running
}

#[test]
fn epochs_are_steps() {
    const BATCHES: [(usize, usize); 3] = [(0, 100), (100, 100), (200, 50)];
    for (dtype, metric) in
        DTYPES.into_iter().flat_map(|t| [Metric::SquaredEuclidean, Metric::Cosine, Metric::Dot].map(|m| (t, m)))
    {
        let x = blobs(&[250, 4], 5, dtype, &mut rng(1));
        let weights = tensor(&[250], DType::F64, |i| [0.0, 1.0, 3.5][i % 3]);
        let source = Source::from_tensor(&x).unwrap();
        for device in devices() {
            let (x, on_device) = (x.to_device(&device).unwrap(), weights.to_device(&device).unwrap());
            for (init, weights) in [
                (Init::Auto, None),
                (Init::Random, None),
                (Init::KMeansPlusPlus, None),
                (Init::Even, Some(&weights)),
                (Init::Random, Some(&weights)),
            ] {
                let what = format!("{dtype:?} {metric:?} {init:?} on {:?}", device.location());
                let plain = KMeans::new(5).metric(metric).init(init).seed(7);
                let (mut settings, mut whole) = (plain.clone(), plain.max_iters(0));
                if let Some(weights) = weights {
                    (settings, whole) = (settings.sample_weights(weights), whole.sample_weights(&on_device));
                }
                let start = MiniBatch::new(&whole.fit(&x).unwrap().centroids, metric).unwrap();
                let of_device = weights.map(|_| &on_device);
                let expected = by_hand(&start, &x, of_device, &[BATCHES, BATCHES].concat());
                let epochs = Epochs::new(2).batch_rows(100);
                // Neither memory nor blocks change anything.
                let options = StreamOptions::new(&device);
                let tight = options.clone().block_rows(7).memory(8 * 100 * source.row_bytes());
                for options in [options, tight] {
                    let trained = MiniBatch::train_stream(&source, &settings, &options, &epochs).unwrap();
                    assert_same_means(&trained, &expected, &what);
                    let mut running = MiniBatch::start_stream(&source, &settings, &options).unwrap();
                    assert_same_means(&running, &start, &what);
                    match weights {
                        Some(weights) => running.step_stream_weighted(&source, weights, &options, &epochs).unwrap(),
                        None => running.step_stream(&source, &options, &epochs).unwrap(),
                    }
                    assert_same_means(&running, &expected, &what);
                    let wrong = ones(&[249], DType::F64, &Device::Cpu);
                    let error = running.step_stream_weighted(&source, &wrong, &options, &epochs).unwrap_err();
                    assert_eq!(error.to_string(), "sample_weights: shape [249], expected [250]");
                }
            }
        }
    }
}

/// Whatever the order, it is one of all batches, by the seed alone and another in each pass.
#[test]
fn batches_are_shuffled() {
    const ORDERS: [[usize; 3]; 6] = [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]];
    let x = uniform(&[30, 2], 0.0, 1.0, DType::F64, &mut rng(2));
    let (source, options) = (Source::from_tensor(&x).unwrap(), StreamOptions::new(&Device::Cpu));
    let start = MiniBatch::new(&x.narrow(0, 0, 3).unwrap(), Metric::SquaredEuclidean).unwrap();
    let stepped = |from: &MiniBatch, order: &[usize]| {
        by_hand(from, &x, None, &order.iter().map(|batch| (10 * batch, 10)).collect::<Vec<_>>())
    };
    let means = |running: &MiniBatch| bits(&running.centroids().unwrap());
    let (mut seen, mut differing) = ([0; 6], 0);
    for seed in 0..200 {
        let run = |count| {
            let mut running = start.clone();
            let epochs = Epochs::new(count).batch_rows(10).shuffled(seed);
            running.step_stream(&source, &options, &epochs).unwrap();
            running
        };
        let (one, two) = (run(1), run(2));
        assert_eq!(means(&one), means(&run(1)));
        let order_of = |from: &MiniBatch, to: &MiniBatch| {
            ORDERS.iter().position(|order| means(&stepped(from, order)) == means(to)).unwrap()
        };
        let (first, second) = (order_of(&start, &one), order_of(&one, &two));
        seen[first] += 1;
        differing += usize::from(first != second);
    }
    // Pearson's statistic, 5 degrees of freedom: 1 of 100,000 such samples has more than 30.9.
    let chi_squared: f64 = seen.iter().map(|&t| (f64::from(t) - 200.0 / 6.0).powi(2) / (200.0 / 6.0)).sum();
    assert!(chi_squared < 30.9 && differing > 100, "{seen:?}, {differing} differ");
}

/// Rows that are not finite weigh nothing, and are no seeds.
#[test]
fn rows_that_are_not_finite_weigh_nothing() {
    let x = tensor(&[90, 2], DType::F32, |i| if i / 2 % 3 == 0 { f64::NAN } else { (i * 37 % 101) as f64 });
    let source = Source::from_tensor(&x).unwrap();
    for device in devices() {
        for init in [Init::Random, Init::Even, Init::KMeansPlusPlus] {
            let settings = KMeans::new(4).init(init);
            let epochs = Epochs::new(1).batch_rows(40);
            let running = MiniBatch::train_stream(&source, &settings, &StreamOptions::new(&device), &epochs).unwrap();
            assert_eq!(f64s(running.counts()).iter().sum::<f64>(), 60.0);
        }
    }
}

#[test]
fn epochs_are_refused() {
    let x = blobs(&[250, 4], 5, DType::F32, &mut rng(3));
    let (source, options, epochs) =
        (Source::from_tensor(&x).unwrap(), StreamOptions::new(&Device::Cpu), Epochs::new(1).batch_rows(100));
    let train = |settings: KMeans, options: &StreamOptions, epochs: &Epochs| {
        MiniBatch::train_stream(&source, &settings, options, epochs).unwrap_err().to_string()
    };
    let lengths = Tensor::new(30u32, &Device::Cpu).unwrap();
    for (refused, expected) in [
        (train(KMeans::new(251), &options, &epochs), "k: 251 is outside 1..=250"),
        (train(KMeans::new(2).n_init(2), &options, &epochs), "n_init: 2 cannot be combined with a mini-batch"),
        (
            train(KMeans::new(2).lengths(&lengths), &options, &epochs),
            "lengths: a tensor cannot be combined with a stream",
        ),
        (
            train(KMeans::new(2).metric(Metric::Manhattan), &options, &epochs),
            "metric: manhattan cannot be combined with",
        ),
        (train(KMeans::new(2), &options, &epochs.clone().batch_rows(0)), "batch_rows: 0 is outside 1.."),
        (
            train(KMeans::new(2), &options.clone().memory(8 * 64 * source.row_bytes()), &epochs),
            "batch_rows: 100 is outside 1..=64",
        ),
    ] {
        assert!(refused.starts_with(expected), "{refused}");
    }
    for (start, argument) in [
        (blobs(&[2, 3], 2, DType::F32, &mut rng(4)), "x"),
        (blobs(&[2, 4], 2, DType::F64, &mut rng(4)), "x"),
        (blobs(&[2, 2, 4], 2, DType::F32, &mut rng(4)), "x"),
    ] {
        let mut running = MiniBatch::new(&start, Metric::SquaredEuclidean).unwrap();
        let refused = running.step_stream(&source, &options, &epochs).unwrap_err();
        assert!(refused.to_string().starts_with(argument), "{refused}");
        assert_eq!(f64s(running.counts()).iter().sum::<f64>(), 0.0);
    }
}

/// A start of fewer finite rows than clusters repeats them, and one of none is zeros, as that of rows in memory.
#[test]
fn a_start_has_finite_rows_alone() {
    let rows = [[f32::NAN, 0.0], [1.0, 2.0], [f32::INFINITY, 1.0], [3.0, 4.0]];
    for device in devices() {
        let options = StreamOptions::new(&device);
        let started = |rows: [[f32; 2]; 4], init| {
            let source = Source::from_tensor(&Tensor::new(&rows, &Device::Cpu).unwrap()).unwrap();
            MiniBatch::train_stream(&source, &KMeans::new(3).init(init), &options, &Epochs::new(0))
        };
        for init in [Init::Auto, Init::Random, Init::Even, Init::KMeansPlusPlus, Init::KMeansParallel] {
            let seeds = f64s(&started(rows, init.clone()).unwrap().centroids().unwrap());
            for seed in seeds.chunks(2) {
                assert!(seed == [1.0, 2.0] || seed == [3.0, 4.0], "{init:?}: {seeds:?}");
            }
            assert!(seeds.contains(&1.0) && seeds.contains(&3.0), "{init:?}: {seeds:?}");
            let none = started([[f32::NAN; 2]; 4], init.clone()).unwrap();
            assert_eq!(f64s(&none.centroids().unwrap()), [0.0; 6], "{init:?}");
        }
        let given = Tensor::new(&[[1f32, 2.0], [f32::NAN, 0.0], [0.0, 0.0]], &device).unwrap();
        let error = started(rows, Init::Given(given)).unwrap_err().to_string();
        assert_eq!(error, "init: row 1 of batch element 0 holds a NaN or an infinity");
    }
}
