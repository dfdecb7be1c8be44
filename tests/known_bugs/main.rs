//! One test for each class of bug found in other k-means libraries, named after where it was reported; the modules hold
//! the kinds of fault that audits found in this one.

#[path = "../common/mod.rs"]
mod common;

mod assignment;
mod attention;
mod codebooks;
mod cuda;
mod files;
mod fits;
mod locks;
mod sums;

use candle_core::{DType, Device, Tensor, D};
use candle_flash_kmeans::{assign, cluster_means, EmptyClusters, Error, Init, KMeans, Metric};
use common::*;

/// facebookresearch/faiss#1196: counters and sums in f32 stop at 2^24.
#[test]
fn faiss_1196_f32_counter_saturates() {
    let n = (1 << 24) + 8;
    for device in devices() {
        let x = Tensor::ones((n, 1), DType::F32, &device).unwrap();
        let fit = KMeans::new(1).max_iters(1).fit(&x).unwrap();
        assert_eq!((u32s(&fit.counts), f64s(&fit.centroids)), (vec![n as u32], vec![1.0]));
        let shifted = Init::Given(Tensor::zeros((1, 1), DType::F32, &device).unwrap());
        let start = KMeans::new(1).init(shifted).max_iters(0).fit(&x).unwrap();
        assert_eq!(f64s(&start.inertia), [n as f64]);
    }
}

/// ClickHouse#119117 and scikit-learn#9354: the expanded distance loses everything far from the origin.
#[test]
fn clickhouse_119117_common_offset() {
    let mut rng = rng(61);
    for device in devices() {
        let x = uniform(&[400, 64], 1e5, 1.0, DType::F32, &mut rng);
        let c = uniform(&[256, 64], 1e5, 1.0, DType::F32, &mut rng);
        let got =
            assign(&x.to_device(&device).unwrap(), &c.to_device(&device).unwrap(), Metric::SquaredEuclidean).unwrap();
        assert_eq!(u32s(&got), spec_labels(&x, &c, Metric::SquaredEuclidean));
    }
}

/// scikit-learn-intelex#25: inertia from the expanded distance comes out as zero or negative.
#[test]
fn intelex_25_inertia_zero() {
    for device in devices() {
        let x = Tensor::new(&[[1e8f32, 1.], [1e8, 2.], [1e8, 3.], [1e8, 4.]], &device).unwrap();
        assert_eq!(f64s(&KMeans::new(1).fit(&x).unwrap().inertia), [5.0]);
    }
}

/// svg-project/flash-kmeans 7384556: masked lanes hold 0, which wins when all true scores are worse.
#[test]
fn flash_kmeans_7384556_masked_lane_wins() {
    for device in devices() {
        for k in [1, 15, 63, 65, 127, 129, 257, 513] {
            let x = Tensor::ones((70, 5), DType::F32, &device).unwrap();
            let c = Tensor::arange(1f32, 1.0 + k as f32, &device)
                .unwrap()
                .reshape((k, 1))
                .unwrap()
                .broadcast_as((k, 5))
                .unwrap();
            for metric in [Metric::Dot, Metric::Cosine] {
                assert!(u32s(&assign(&x, &c.neg().unwrap(), metric).unwrap()).iter().all(|&l| (l as usize) < k));
            }
            assert_eq!(u32s(&assign(&x, &c.neg().unwrap(), Metric::Dot).unwrap()), [0; 70]);
        }
    }
}

/// flash-kmeans: with `tol` 0 a test `shift < tol` never stops.
#[test]
fn flash_kmeans_tol_zero_stops() {
    for device in devices() {
        let x = uniform(&[300, 2], 0.0, 1.0, DType::F32, &mut rng(62)).to_device(&device).unwrap();
        let fit = KMeans::new(3).tol(0.0).max_iters(10_000).fit(&x).unwrap();
        assert_eq!(fit.converged.to_scalar::<u8>().unwrap(), 1);
    }
}

/// flash-kmeans: 64 * 40^2 is infinite in f16.
#[test]
fn flash_kmeans_f16_norm_overflow() {
    let mut rng = rng(63);
    for device in devices() {
        let x = uniform(&[200, 64], 0.0, 60.0, DType::F16, &mut rng);
        let c = uniform(&[50, 64], 0.0, 60.0, DType::F16, &mut rng);
        for metric in METRICS {
            let got = assign(&x.to_device(&device).unwrap(), &c.to_device(&device).unwrap(), metric).unwrap();
            assert_eq!(u32s(&got), spec_labels(&x, &c, metric));
        }
    }
}

/// keops#165: a cluster without rows becomes NaN.
#[test]
fn keops_165_empty_cluster() {
    for device in devices() {
        let x = Tensor::ones((4, 2), DType::F16, &device).unwrap();
        let c = Init::Given(Tensor::new(&[[1f32, 1.], [50., 50.]], &device).unwrap().to_dtype(DType::F16).unwrap());
        assert_eq!(f64s(&KMeans::new(2).init(c).fit(&x).unwrap().centroids), [1.0, 1.0, 50.0, 50.0]);
        let labels = Tensor::zeros(4, DType::U32, &device).unwrap();
        assert_eq!(f64s(&cluster_means(&x, &labels, 3).unwrap()), [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]);
    }
}

/// pyclustering#368: k-means++ over duplicates divides by a total of zero.
#[test]
fn pyclustering_368_kmeanspp_duplicates() {
    for device in devices() {
        let x = Tensor::new(&[[1f32], [1.], [1.], [2.], [2.]], &device).unwrap();
        for init in [Init::KMeansPlusPlus, Init::KMeansParallel] {
            let start = KMeans::new(5).init(init).max_iters(0).fit(&x).unwrap();
            let mut rows = f64s(&start.centroids);
            rows.sort_by(f64::total_cmp);
            assert_eq!(rows, [1.0, 1.0, 1.0, 2.0, 2.0], "every row once");
        }
    }
}

/// cuvs#1805: a grid dimension of 65,535 bounds the centroids; the same limit has bounded batches elsewhere.
#[test]
fn cuvs_1805_grid_y() {
    for device in devices() {
        let c = Tensor::arange(0f32, 300_000f32, &device).unwrap().unsqueeze(1).unwrap();
        let rows = [0u32, 262_141, 299_999, 65_536];
        let x = Tensor::new(&rows.map(|r| [r as f32 + 0.25]), &device).unwrap();
        assert_eq!(u32s(&assign(&x, &c, Metric::SquaredEuclidean).unwrap()), rows);
        let b = 70_000;
        let x = Tensor::arange(0f32, 2.0 * b as f32, &device).unwrap().reshape((b, 2, 1)).unwrap();
        let fit = KMeans::new(2).init(Init::Given(x.clone())).fit(&x).unwrap();
        assert_eq!(u32s(&fit.labels), [0, 1].repeat(b));
        assert_eq!(f64s(&fit.centroids), f64s(&x));
    }
}

/// candle#3875: an op that forgets the offset of a narrowed view, here of labels.
#[test]
fn candle_3875_offset_view() {
    for device in devices() {
        let labels = Tensor::new(&[[9u32, 9, 9], [1, 0, 1]], &device).unwrap().narrow(0, 1, 1).unwrap();
        let x = Tensor::new(&[[[1f32], [5.], [3.]]], &device).unwrap();
        assert_eq!(f64s(&cluster_means(&x, &labels, 2).unwrap()), [5.0, 2.0]);
        let column = Tensor::new(&[[7u32, 1], [7, 0], [7, 1]], &device).unwrap().get_on_dim(D::Minus1, 1).unwrap();
        assert_eq!(f64s(&cluster_means(&x.squeeze(0).unwrap(), &column, 2).unwrap()), [5.0, 2.0]);
    }
}

/// cuvs#2657: a fit stops after another number of iterations in the next run.
#[test]
fn cuvs_2657_run_to_run() {
    for device in devices() {
        let x = uniform(&[5000, 8], 0.0, 1.0, DType::F32, &mut rng(64)).to_device(&device).unwrap();
        let run = || KMeans::new(20).tol(1e-5).max_iters(200).fit(&x).unwrap();
        let first = run();
        for _ in 0..5 {
            let next = run();
            assert_eq!((u32s(&next.n_iter), bits(&next.inertia)), (u32s(&first.n_iter), bits(&first.inertia)));
        }
    }
}

/// linfa: the memberships of the last run beside the centroids of the best.
#[test]
fn linfa_best_run_labels() {
    let x = uniform(&[300, 3], 0.0, 1.0, DType::F32, &mut rng(65));
    for seed in 0..10 {
        let fit = KMeans::new(12).n_init(4).seed(seed).fit(&x).unwrap();
        assert_eq!(u32s(&fit.labels), u32s(&assign(&x, &fit.centroids, fit.metric).unwrap()));
        assert_eq!(fit.labels.device().location(), Device::Cpu.location());
    }
}

/// scikit-learn#9354: rows that differ in the last bits only, which the expanded distance cancels.
#[test]
fn sklearn_9354_cancellation() {
    let (x, c) = ([[10_000.001f32, 1.0], [10_000.002, 1.0]], [[10_000.002f32, 1.0], [10_000.001, 1.0]]);
    for device in devices() {
        let (x, c) = (Tensor::new(&x, &device).unwrap(), Tensor::new(&c, &device).unwrap());
        assert_eq!(u32s(&assign(&x, &c, Metric::SquaredEuclidean).unwrap()), [1, 0]);
    }
}

/// scikit-learn#12506: labels of the centroids before the last update.
#[test]
fn sklearn_12506_labels_match_centroids() {
    for device in devices() {
        let x = uniform(&[400, 4], 0.0, 1.0, DType::F32, &mut rng(66)).to_device(&device).unwrap();
        for max_iters in 0..12 {
            let fit = KMeans::new(15).max_iters(max_iters).tol(0.0).fit(&x).unwrap();
            assert_same(
                &fit.labels,
                &assign(&x, &fit.centroids, fit.metric).unwrap(),
                &format!("{max_iters} iterations"),
            );
        }
    }
}

/// scikit-learn#34074: the same after empty clusters were moved.
#[test]
fn sklearn_34074_pairing_after_empty() {
    for device in devices() {
        let x = blobs(&[3, 200, 2], 4, DType::F32, &mut rng(67)).to_device(&device).unwrap();
        let c = Tensor::full(1e4f32, (9, 2), &device).unwrap();
        for (metric, max_iters) in METRICS.into_iter().flat_map(|m| [0, 1, 2, 3, 50].map(|i| (m, i))) {
            let settings = KMeans::new(9).metric(metric).init(Init::Given(c.clone())).max_iters(max_iters);
            let fit = settings.empty_clusters(EmptyClusters::Relocate).fit(&x).unwrap();
            assert_same(&fit.labels, &fit.predict(&x).unwrap(), &format!("{metric:?}, {max_iters} iterations"));
            let filled = u32s(&fit.counts).iter().filter(|&&c| c > 0).count();
            assert!(metric != Metric::SquaredEuclidean || max_iters == 0 || filled > 20, "{filled} of 27 clusters");
        }
    }
}

/// flash-kmeans de2cf1e: a crash where the columns are no power of two.
#[test]
fn flash_kmeans_de2cf1e_odd_d() {
    for (device, d) in devices().into_iter().flat_map(|device| [3, 5, 80, 96, 129, 200].map(|d| (device.clone(), d))) {
        let x = uniform(&[300, d], 0.0, 1.0, DType::F16, &mut rng(68));
        let fit = KMeans::new(7).init(Init::Given(x.narrow(0, 0, 7).unwrap().to_device(&device).unwrap())).max_iters(0);
        let got = fit.fit(&x.to_device(&device).unwrap()).unwrap();
        assert_eq!(u32s(&got.labels), spec_labels(&x, &x.narrow(0, 0, 7).unwrap(), Metric::SquaredEuclidean));
    }
}

/// flash-kmeans e740709: strides ignored, here those of keys as a transformer holds them.
#[test]
fn flash_kmeans_e740709_strided() {
    for device in devices() {
        let cache = uniform(&[2, 90, 3, 8], 0.0, 1.0, DType::BF16, &mut rng(69)).to_device(&device).unwrap();
        let keys = cache.transpose(1, 2).unwrap();
        let fit = |x: &Tensor| KMeans::new(6).fit(x).unwrap();
        assert_same_fit(&fit(&keys), &fit(&keys.contiguous().unwrap()), "(batch, position, head, column)");
    }
}

/// cuml#8067: the check for sizes that overflow overflowed itself.
#[test]
fn cuml_8067_overflow_check_overflows() {
    let one = Tensor::ones((1, 1, 1, 1), DType::F32, &Device::Cpu).unwrap();
    let c = Tensor::ones((1, 1), DType::F32, &Device::Cpu).unwrap();
    for shape in [(1 << 32, 1 << 32, 1, 1), (1 << 40, 1 << 20, 16, 1), (1 << 33, 1 << 31, 5, 1), (1, 1 << 62, 3, 2)] {
        let x = one.broadcast_as(shape).unwrap();
        let got = assign(&x, &c.broadcast_as((1, shape.3)).unwrap(), Metric::Dot);
        assert!(matches!(got, Err(Error::TooLarge { .. })), "{shape:?}: {:?}", got.map(|t| t.dims().to_vec()));
        assert!(matches!(KMeans::new(1).fit(&x), Err(Error::TooLarge { .. })), "{shape:?}");
    }
    // Columns, too: no plan may say that sizes past 2^64 bytes take few.
    let x = c.broadcast_as((4, 1 << 61)).unwrap();
    assert!(KMeans::new(4).plan(&x).map_or(true, |plan| plan.bytes >= 1 << 62));
}

/// candle#3892: a kernel on another stream than the tensor's.
#[test]
fn candle_3892_callers_stream() {
    if devices().len() == 1 {
        return;
    }
    let x = blobs(&[4, 3000, 32], 9, DType::F16, &mut rng(70));
    let want = KMeans::new(20).fit(&x).unwrap();
    for _ in 0..5 {
        let device = Device::new_cuda_with_stream(0).unwrap();
        // Work still under way on that stream: whoever does not wait for it reads something else.
        let late = (0..20).fold(x.to_device(&device).unwrap(), |x, _| x.neg().unwrap());
        assert_same_fit(&KMeans::new(20).fit(&late).unwrap(), &want, "a stream of its own");
    }
}
