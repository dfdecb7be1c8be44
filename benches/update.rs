//! Means of the rows of each cluster, sort included.

mod common;

use candle_flash_kmeans::{assign, cluster_means, Metric};
use criterion::{criterion_group, criterion_main, Criterion};

fn bench(c: &mut Criterion) {
    common::each(c, "update", |shape, x| {
        let centroids = x.narrow(1, 0, shape.k).expect("k rows");
        let labels = assign(x, &centroids, Metric::SquaredEuclidean).expect("labels");
        let (x, k) = (x.clone(), shape.k);
        Box::new(move || drop(cluster_means(&x, &labels, k).expect("means")))
    });
}

criterion_group!(benches, bench);
criterion_main!(benches);
