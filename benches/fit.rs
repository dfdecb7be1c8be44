//! Ten iterations from given centroids.

mod common;

use candle_flash_kmeans::{Init, KMeans};
use criterion::{criterion_group, criterion_main, Criterion};

fn bench(c: &mut Criterion) {
    common::each(c, "fit_10", |shape, x| {
        let start = x.narrow(1, 0, shape.k).expect("k rows");
        let (x, fit) = (x.clone(), KMeans::new(shape.k).init(Init::Given(start)).max_iters(10).tol(0.0));
        Box::new(move || drop(fit.fit(&x).expect("a fit")))
    });
}

criterion_group!(benches, bench);
criterion_main!(benches);
