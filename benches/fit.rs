//! Ten iterations from given centroids, with `tol` 0 and with the default, which takes one more pass over the rows.

mod common;

use candle_flash_kmeans::{Init, KMeans};
use criterion::{criterion_group, criterion_main, Criterion};

fn bench(c: &mut Criterion) {
    let settings: [(_, fn(KMeans) -> KMeans); 2] = [("fit_10", |fit| fit.tol(0.0)), ("fit_10_tol", |fit| fit)];
    for (name, with) in settings {
        common::each(c, name, |shape, x| {
            let start = x.narrow(1, 0, shape.k).expect("k rows");
            let (x, fit) = (x.clone(), with(KMeans::new(shape.k).init(Init::Given(start)).max_iters(10)));
            Box::new(move || drop(fit.fit(&x).expect("a fit")))
        });
    }
}

criterion_group!(benches, bench);
criterion_main!(benches);
