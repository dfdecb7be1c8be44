//! Segments that are appended, one fit each.

use crate::common::*;
use candle_core::{DType, Device, Tensor};
use candle_flash_kmeans::{sort_by_cluster, Error, Init, KMeans, Metric, Segments};

#[test]
fn segments_are_numbered_on() {
    let mut rng = rng(113);
    for device in devices() {
        for batch in [vec![], vec![2, 3]] {
            let fit = |n: usize, k: usize, rng: &mut _| {
                let x = blobs(&[&batch[..], &[n, 4]].concat(), 5, DType::F16, rng).to_device(&device).unwrap();
                KMeans::new(k).init(Init::Even).max_iters(3).fit(&x).unwrap()
            };
            let fits = [fit(100, 7, &mut rng), fit(3, 3, &mut rng), fit(64, 5, &mut rng)];
            let mut cache = Segments::from_fit(&fits[0]).unwrap();
            fits[1..].iter().for_each(|fit| cache.append(fit).unwrap());
            let last = batch.len();
            let joined = |of: fn(&candle_flash_kmeans::Fit) -> &Tensor| {
                Tensor::cat(&fits.iter().map(of).collect::<Vec<_>>(), last).unwrap()
            };
            assert_same(&cache.centroids, &joined(|f| &f.centroids), "centroids");
            assert_same(&cache.counts, &joined(|f| &f.counts), "counts");
            let (labels, got) = (u32s(&joined(|f| &f.labels)), u32s(&cache.labels));
            let from = |i: usize| [0, 7, 10][(i % 167 >= 100) as usize + (i % 167 >= 103) as usize];
            assert!((0..got.len()).all(|i| got[i] == labels[i] + from(i)), "{got:?}");
            // Sorted again from the beginning, it is the same.
            let (order, offsets) = sort_by_cluster(&cache.labels, 15).unwrap();
            assert_same(&cache.order, &order, "order");
            assert_same(&cache.offsets, &offsets, "offsets");
        }
    }
}

#[test]
fn segments_that_do_not_fit_are_refused() {
    let device = Device::Cpu;
    let fit = |shape: &[usize], dtype, metric| KMeans::new(2).metric(metric).fit(&ones(shape, dtype, &device)).unwrap();
    let mut cache = Segments::from_fit(&fit(&[2, 5, 3], DType::F32, Metric::Dot)).unwrap();
    let mut refused = |shape: &[usize], dtype, metric| cache.append(&fit(shape, dtype, metric)).unwrap_err();
    let error = refused(&[2, 5, 3], DType::F32, Metric::Cosine);
    assert!(error.to_string().contains("metric: cosine cannot be combined with segments by dot"), "{error}");
    for shape in [&[2, 5, 4][..], &[3, 5, 3], &[5, 3]] {
        assert!(matches!(refused(shape, DType::F32, Metric::Dot), Error::Shape { argument: "fit", .. }), "{shape:?}");
    }
    assert!(matches!(refused(&[2, 5, 3], DType::F64, Metric::Dot), Error::DType { argument: "fit", .. }));
    assert_eq!((cache.labels.dims(), cache.centroids.dims()), (&[2, 5][..], &[2, 2, 3][..]));
}
