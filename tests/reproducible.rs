//! The same input, seed and version: the same bits, whatever runs them.

mod common;

use candle_core::{DType, Tensor};
use candle_flash_kmeans::{Fit, Init, KMeans};
use common::*;
use rayon::ThreadPoolBuilder;

fn all_bits(fit: &Fit) -> Vec<u64> {
    let counts = [&fit.labels, &fit.counts, &fit.n_iter].map(u32s).concat();
    [bits(&fit.centroids), bits(&fit.inertia), counts.into_iter().map(u64::from).collect()].concat()
}

fn cases() -> Vec<(KMeans, Tensor)> {
    let mut rng = rng(51);
    let weights = uniform(&[20_000], 1.0, 1.0, DType::F64, &mut rng);
    let mut cases = vec![];
    for (i, metric) in METRICS.into_iter().enumerate() {
        let x = uniform(&[20_000, 9], 0.4, 1.0, DTYPES[i], &mut rng);
        // One cluster that holds most rows is summed in many parts.
        let settings = KMeans::new(13).metric(metric).max_iters(6).tol(0.0);
        cases.push((settings.clone(), x.clone()));
        cases.push((settings.clone().sample_weights(&weights).init(Init::KMeansPlusPlus), x.clone()));
        cases.push((settings.init(Init::KMeansParallel), x.narrow(0, 0, 900).unwrap().reshape((3, 300, 9)).unwrap()));
    }
    cases
}

#[test]
fn for_any_number_of_threads() {
    for (settings, x) in cases() {
        let with = |threads: usize| {
            let pool = ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            all_bits(&pool.install(|| settings.fit(&x)).unwrap())
        };
        let one = with(1);
        [2, 3, 8, 16].into_iter().for_each(|threads| assert_eq!(with(threads), one, "{threads} threads"));
    }
}

#[test]
fn from_run_to_run() {
    for device in devices() {
        for (settings, x) in cases() {
            let x = x.to_device(&device).unwrap();
            // Weights live where the rows do.
            let Ok(first) = settings.fit(&x).map(|f| all_bits(&f)) else {
                assert!(!device.is_cpu());
                continue;
            };
            (0..10).for_each(|_| assert_eq!(all_bits(&settings.fit(&x).unwrap()), first));
        }
    }
}
