//! How often labels are sorted: once, by whatever needs their order.

use crate::common::*;
use candle_core::{DType, Device, Tensor};
use candle_flash_kmeans::{
    cluster_means, cluster_sizes, cluster_sums,
    nn::{ClusteredKvCache, Codebook, Ema, EmaCodebook, KeyBudget, RoutedAttention},
    sort_by_cluster, testing, EmptyClusters, Init, KMeans, Metric, MiniBatch, Segments,
};

/// The sorts that `f` asks for.
fn sorts(f: impl FnOnce()) -> u64 {
    let before = testing::sorts();
    f();
    testing::sorts() - before
}

#[track_caller]
fn sorted(times: u64, what: &str, device: &Device, f: impl FnOnce()) {
    assert_eq!(sorts(f), times, "{what} on {:?}", device.location());
}

/// Three rows around each of 20 points, the rows `20, 21, ..` around the same points as `0, 1, ..`.
fn rows(batch: &[usize], d: usize, dtype: DType, device: &Device) -> Tensor {
    let shape = [batch, &[60, d]].concat();
    let value = |i: usize| (i / d % 20 * 8 + i / (20 * d) % 3) as f64 / 8.0;
    tensor(&shape, dtype, value).to_device(device).unwrap()
}

#[test]
fn functions_sort_their_labels_once() {
    for device in devices() {
        let x = rows(&[2], 3, DType::F32, &device);
        let labels = KMeans::new(20).init(Init::Even).fit_predict(&x).unwrap();
        sorted(1, "sort_by_cluster", &device, || drop(sort_by_cluster(&labels, 20).unwrap()));
        sorted(1, "cluster_sizes", &device, || drop(cluster_sizes(&labels, 20).unwrap()));
        sorted(1, "cluster_means", &device, || drop(cluster_means(&x, &labels, 20).unwrap()));
        sorted(1, "cluster_sums", &device, || drop(cluster_sums(&x, &labels, 20).unwrap()));
    }
}

/// With weights there were two sorts of the same labels, and three in a fit that relocates in one iteration.
#[test]
fn a_fit_sorts_its_last_labels_once() {
    for device in devices() {
        let x = rows(&[2], 3, DType::F32, &device);
        let weights = Tensor::ones((2, 60), DType::F32, &device).unwrap();
        let lengths = Tensor::new(&[60u32, 50], &device).unwrap();
        let none = KMeans::new(20).init(Init::Even).max_iters(0);
        for (what, kmeans) in [
            ("rows", none.clone()),
            ("weights", none.clone().sample_weights(&weights)),
            ("lengths", none.clone().lengths(&lengths)),
            ("weights and lengths", none.clone().sample_weights(&weights).lengths(&lengths)),
        ] {
            sorted(1, what, &device, || drop(kmeans.fit(&x).unwrap()));
        }
        for lengths in [None, Some(&lengths)] {
            let relocating = none.clone().empty_clusters(EmptyClusters::Relocate).max_iters(1);
            let relocating = lengths.map_or(relocating.clone(), |lengths| relocating.lengths(lengths));
            sorted(2, "no cluster is empty", &device, || drop(relocating.fit(&x).unwrap()));
        }
    }
}

/// There were two sorts in a step of `MiniBatch` and of `EmaCodebook`.
#[test]
fn learners_sort_their_labels_once() {
    for device in devices() {
        let x = rows(&[2], 4, DType::F32, &device);
        for metric in [Metric::SquaredEuclidean, Metric::Cosine] {
            let fit = KMeans::new(5).metric(metric).init(Init::Even).fit(&x).unwrap();
            let mut running = MiniBatch::from_fit(&fit).unwrap();
            sorted(1, "MiniBatch", &device, || drop(running.step(&x).unwrap()));
            let mut ema = EmaCodebook::new(Codebook::new(&fit.centroids, metric).unwrap(), Ema::default()).unwrap();
            sorted(1, "EmaCodebook", &device, || drop(ema.step(&x).unwrap()));
            sorted(1, "Segments::from_fit", &device, || drop(Segments::from_fit(&fit).unwrap()));
            let mut segments = Segments::from_fit(&fit).unwrap();
            sorted(1, "Segments::append", &device, || segments.append(&fit).unwrap());
        }
    }
}

/// There were 5 sorts for keys and queries and 4 for keys alone where Candle's ops attend, and 3 for a segment of a cache.
#[test]
fn attention_sorts_its_labels_once() {
    for (device, dtype) in devices().into_iter().flat_map(|device| [(device.clone(), DType::F16), (device, DType::F32)])
    {
        if device.is_cuda() && dtype == DType::F32 {
            // No kernel attends to these, and ranks of scores are sorted by counting, too.
            continue;
        }
        let x = rows(&[1, 2], 64, dtype, &device);
        // Without passes of k-means, whose every update sorts its labels.
        let routed = || RoutedAttention::new(KeyBudget::Share(0.5)).passes(0, 0).sinks(2).recent(2);
        sorted(2, "keys and queries", &device, || drop(routed().forward(&x, &x, &x, 0.1).unwrap()));
        let chunk = x.narrow(2, 50, 10).unwrap();
        let mut causal = routed().causal_choice(true);
        sorted(1, "keys alone", &device, || drop(causal.forward_causal(&chunk, &x, &x, 0.1).unwrap()));

        let mut cache = ClusteredKvCache::new(64).sinks(2).recent(2).segment(8).cluster_size(4).passes(0);
        cache.append(&x, &x).unwrap();
        let mut pages = cache.clone();
        sorted(1, "ClusteredKvCache::cluster", &device, || assert!(cache.cluster().unwrap()));
        let labels = Tensor::from_iter((0..2 * 56u32).map(|i| i % 7), &device).unwrap().reshape((1, 2, 56)).unwrap();
        sorted(1, "ClusteredKvCache::group", &device, || pages.group(&labels, 7).unwrap());
    }
}
