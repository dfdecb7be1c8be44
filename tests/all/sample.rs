//! A fit of a sample has the centroids of those rows alone, and the labels of all rows.

use crate::common::*;
use candle_core::{DType, Device, Tensor};
use candle_flash_kmeans::{Error, Fit, Init, KMeans, Metric, Source, StoredType, StreamOptions};
use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex},
};

/// The rows of `x`, and the first of them that are read: so many. What is read later is not noted.
fn noted(x: &Tensor, count: usize) -> (Source<'static>, Arc<Mutex<BTreeSet<u32>>>) {
    let (rows_read, (n, d), data) = (Arc::new(Mutex::new(BTreeSet::new())), x.dims2().unwrap(), f64s(x));
    let note = rows_read.clone();
    let source = Source::from_fn(n as u64, d, StoredType::F64, move |rows, into| {
        let mut note = note.lock().unwrap();
        if note.len() < count {
            note.extend(rows.start as u32..rows.end as u32);
        }
        let values = &data[rows.start as usize * d..rows.end as usize * d];
        into.chunks_exact_mut(8).zip(values).for_each(|(into, v)| into.copy_from_slice(&v.to_ne_bytes()));
        Ok(())
    });
    (source.unwrap(), rows_read)
}

fn merged(of_sample: &Fit, of_all: Fit) -> Fit {
    let mut fit = of_all;
    (fit.n_iter, fit.converged) = (of_sample.n_iter.clone(), of_sample.converged.clone());
    fit
}

#[test]
fn a_sample_is_fitted_alone() {
    let x = blobs(&[300, 4], 5, DType::F64, &mut rng(1));
    let weights = tensor(&[300], DType::F64, |i| [0.0, 1.0, 3.5, 0.1][i % 4]);
    for metric in [Metric::SquaredEuclidean, Metric::Cosine, Metric::Dot] {
        let plain = KMeans::new(5).metric(metric).seed(3);
        for device in devices() {
            let (on, back) =
                (|t: &Tensor| t.to_device(&device).unwrap(), |fit: Fit| fit.to_device(&Device::Cpu).unwrap());
            let options = StreamOptions::new(&device).block_rows(64);
            for (settings, weighted) in [
                (plain.clone(), false),
                (plain.clone().init(Init::KMeansPlusPlus).n_init(3), false),
                (plain.clone().init(Init::Even).max_iters(2), true),
                (plain.clone(), true),
            ] {
                let (source, sample) = noted(&x, 100);
                let with = |weights: Tensor| {
                    if weighted {
                        settings.clone().sample_weights(&weights)
                    } else {
                        settings.clone()
                    }
                };
                let fit = with(weights.clone()).fit_sample(&source, 100, &options).unwrap();

                let sample: Vec<_> = sample.lock().unwrap().iter().copied().collect();
                assert_eq!(sample.len(), 100);
                let sample = Tensor::from_vec(sample, 100, &Device::Cpu).unwrap();
                let rows = on(&x.index_select(&sample, 0).unwrap());
                let of_sample = with(on(&weights.index_select(&sample, 0).unwrap())).fit(&rows).unwrap();
                let start = Init::Given(of_sample.centroids.clone());
                let all = with(on(&weights)).n_init(1).init(start).max_iters(0).tol(0.0).fit(&on(&x)).unwrap();
                assert_same_fit(&fit, &back(merged(&of_sample, all.clone())), &format!("{settings:?} on {device:?}"));
                assert_eq!(fit.weights.as_ref().map(bits), all.weights.as_ref().map(bits));
            }
        }
    }
}

/// Each row has the same chance, by the seed alone; of few rows the sample is all.
#[test]
fn samples_are_uniform() {
    let x = blobs(&[50, 2], 3, DType::F64, &mut rng(2));
    let (options, mut times) = (StreamOptions::new(&Device::Cpu), [0f64; 50]);
    for seed in 0..400 {
        let (source, sample) = noted(&x, 10);
        KMeans::new(2).seed(seed).max_iters(0).fit_sample(&source, 10, &options).unwrap();
        sample.lock().unwrap().iter().for_each(|&row| times[row as usize] += 1.0);
    }
    // Pearson's statistic, 49 degrees of freedom: 1 of 100,000 such samples has more than 102.
    let expected = 400.0 * 10.0 / 50.0;
    let chi_squared: f64 = times.iter().map(|t| (t - expected).powi(2) / expected).sum();
    assert!(chi_squared < 102.0, "{chi_squared}: {times:?}");

    let source = Source::from_tensor(&x).unwrap();
    for rows in [50, usize::MAX] {
        let fit = KMeans::new(3).seed(1).fit_sample(&source, rows, &options).unwrap();
        assert_same_fit(&fit, &KMeans::new(3).seed(1).fit(&x).unwrap(), "all rows");
    }
}

#[test]
fn samples_are_refused() {
    let x = blobs(&[50, 2], 3, DType::F64, &mut rng(3));
    let (source, options) = (Source::from_tensor(&x).unwrap(), StreamOptions::new(&Device::Cpu));
    let refused = KMeans::new(4).fit_sample(&source, 3, &options);
    let few = Error::Range { argument: "sample rows", got: 3, min: 4, max: 50 };
    assert_eq!(refused.unwrap_err().to_string(), few.to_string());
    let refused = KMeans::new(4).metric(Metric::Manhattan).fit_sample(&source, 10, &options);
    assert!(matches!(refused, Err(Error::Conflict { argument: "metric", .. })), "{refused:?}");
    // A row is named by its number among all, whether the sample has it or not.
    for row in 0..50 {
        let bad = tensor(&[50, 2], DType::F64, |i| if i == 2 * row { f64::NAN } else { i as f64 });
        let refused = KMeans::new(2).fit_sample(&Source::from_tensor(&bad).unwrap(), 25, &options).unwrap_err();
        assert!(matches!(refused, Error::NonFinite { argument: "x", batch: 0, row: at } if at == row), "{refused:?}");
    }
}
