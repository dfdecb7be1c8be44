//! Ten iterations from given centroids, with `tol` 0 and with the default, which takes one more pass over the rows.

mod common;

use candle_flash_kmeans::{Init, KMeans};
use criterion::{criterion_group, criterion_main, Criterion};

fn bench(c: &mut Criterion) {
    for (name, tol) in [("fit_10", Some(0.0)), ("fit_10_tol", None)] {
        common::each(c, name, |shape, x| {
            let start = x.narrow(1, 0, shape.k).expect("k rows");
            let (x, fit) = (x.clone(), KMeans::new(shape.k).init(Init::Given(start)).max_iters(10));
            let fit = tol.into_iter().fold(fit, KMeans::tol);
            Box::new(move || drop(fit.fit(&x).expect("a fit")))
        });
    }
}

criterion_group!(benches, bench);
criterion_main!(benches);
