//! Exact labels against centroids drawn from the rows.

mod common;

use candle_flash_kmeans::{assign, Metric};
use criterion::{criterion_group, criterion_main, Criterion};

fn bench(c: &mut Criterion) {
    common::each(c, "assign", |shape, x| {
        let (x, centroids) = (x.clone(), x.narrow(1, 0, shape.k).expect("k rows"));
        Box::new(move || drop(assign(&x, &centroids, Metric::SquaredEuclidean).expect("labels")))
    });
}

criterion_group!(benches, bench);
criterion_main!(benches);
