//! Relations between calls that must hold whatever the data.

use crate::common::*;
use candle_core::{DType, Device, Tensor};
use candle_flash_kmeans::{assign, cluster_means, Init, KMeans, Metric};
use proptest::{prelude::*, test_runner::Config};

/// `PROPTEST_CASES` asks for more than the 64 of every change.
fn config() -> Config {
    let cases = std::env::var("PROPTEST_CASES").ok().and_then(|v| v.parse().ok()).unwrap_or(64);
    Config { cases, failure_persistence: None, ..Config::default() }
}

/// Rows, a number of clusters, and the rest of a problem.
#[derive(Clone, Debug)]
struct Case {
    x: Tensor,
    k: usize,
    metric: Metric,
    seed: u64,
}

prop_compose! {
    fn case()(seed in 0u64.., n in 2usize..200, d in 1usize..40, k in 1usize..20, m in 0usize..4, t in 0usize..4,
        gpu: bool) -> Case {
        let (devices, x) = (devices(), uniform(&[n, d], 0.5, 2.0, DTYPES[t], &mut rng(seed)));
        let device = &devices[gpu as usize % devices.len()];
        Case { x: x.to_device(device).unwrap(), k: k.min(n), metric: METRICS[m], seed }
    }
}

impl Case {
    fn n(&self) -> usize {
        self.x.dim(0).unwrap()
    }

    fn start(&self) -> Tensor {
        self.x.narrow(0, 0, self.k).unwrap()
    }

    fn kmeans(&self) -> KMeans {
        KMeans::new(self.k).metric(self.metric).tol(0.0)
    }

    /// A permutation of the rows.
    fn shuffled(&self) -> Vec<u32> {
        let mut order: Vec<u32> = (0..self.n() as u32).collect();
        order.sort_by_key(|&i| (i as u64 + 1).wrapping_mul(self.seed | 1).rotate_left(17));
        order
    }
}

fn pick(t: &Tensor, rows: &[u32]) -> Tensor {
    t.index_select(&Tensor::new(rows, t.device()).unwrap(), 0).unwrap()
}

fn labels(x: &Tensor, c: &Tensor, metric: Metric) -> Vec<u32> {
    u32s(&assign(x, c, metric).unwrap())
}

fn in_f64(t: &Tensor, times: f64) -> Tensor {
    (t.to_dtype(DType::F64).unwrap() * times).unwrap()
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn permuted_rows_permute_labels_and_nothing_else(case in case()) {
        let order = case.shuffled();
        let kmeans = case.kmeans().init(Init::Given(case.start())).max_iters(5);
        let (one, other) = (kmeans.fit(&case.x).unwrap(), kmeans.fit(&pick(&case.x, &order)).unwrap());
        prop_assert_eq!(bits(&pick(&one.labels, &order)), bits(&other.labels));
        prop_assert_eq!(bits(&one.centroids), bits(&other.centroids));
        prop_assert_eq!((bits(&one.inertia), u32s(&one.n_iter)), (bits(&other.inertia), u32s(&other.n_iter)));
    }

    #[test]
    fn reversed_centroids_reverse_labels(case in case()) {
        let (k, c) = (case.k as u32, case.start());
        let back = pick(&c, &(0..k).rev().collect::<Vec<_>>());
        let (a, b) = (labels(&case.x, &c, case.metric), labels(&case.x, &back, case.metric));
        let (rows, centroids) = (problems(&case.x).remove(0), problems(&c).remove(0));
        for (i, (a, b)) in a.into_iter().zip(b).enumerate() {
            // Equal distances go to the lowest index on both sides, which are different centroids.
            let at = |j: u32| naive::distance(&rows[i], &centroids[j as usize], case.metric);
            prop_assert!(a == k - 1 - b || at(a) == at(k - 1 - b) && a < k - 1 - b);
        }
    }

    #[test]
    fn powers_of_two_scale_everything(case in case(), power in -20i32..20) {
        let times = 2f64.powi(power);
        let fit = |t: f64| {
            let start = Init::Given(in_f64(&case.start(), t));
            case.kmeans().init(start).max_iters(4).fit(&in_f64(&case.x, t)).unwrap()
        };
        let (one, other) = (fit(1.0), fit(times));
        prop_assert_eq!(u32s(&one.labels), u32s(&other.labels));
        prop_assert_eq!(u32s(&one.n_iter), u32s(&other.n_iter));
        if case.metric != Metric::Cosine {
            let unit = if case.metric == Metric::Manhattan { times } else { times * times };
            prop_assert_eq!(bits(&(one.centroids * times).unwrap()), bits(&other.centroids));
            prop_assert_eq!(bits(&(one.inertia * unit).unwrap()), bits(&other.inertia));
        }
    }

    #[test]
    fn whole_numbers_may_be_shifted(case in case(), shift in -1000i32..1000) {
        let x = integers(&[100, 5], 20, DType::F32, &mut rng(case.seed)).to_device(case.x.device()).unwrap();
        let c = x.narrow(0, 0, case.k).unwrap();
        let by = |t: &Tensor| (t + shift as f64).unwrap();
        for metric in [Metric::SquaredEuclidean, Metric::Manhattan] {
            prop_assert_eq!(labels(&x, &c, metric), labels(&by(&x), &by(&c), metric));
        }
    }

    #[test]
    fn data_given_twice_clusters_alike(case in case()) {
        let twice = Tensor::cat(&[&case.x, &case.x], 0).unwrap();
        let kmeans = case.kmeans().init(Init::Given(case.start())).max_iters(5);
        let (one, two) = (kmeans.fit(&case.x).unwrap(), kmeans.fit(&twice).unwrap());
        prop_assert_eq!(u32s(&two.labels), u32s(&one.labels).repeat(2));
        prop_assert_eq!(bits(&one.centroids), bits(&two.centroids));
    }

    #[test]
    fn pieces_are_labelled_as_the_whole(case in case()) {
        let (n, fit) = (case.n(), case.kmeans().fit(&case.x).unwrap());
        let cut = 1 + case.seed as usize % (n - 1);
        let piece = |from: usize, count: usize| u32s(&fit.predict(&case.x.narrow(0, from, count).unwrap()).unwrap());
        prop_assert_eq!([piece(0, cut), piece(cut, n - cut)].concat(), u32s(&fit.labels));
    }

    #[test]
    fn counts_are_the_labels_counted(case in case(), max_iters in 0usize..4) {
        let fit = case.kmeans().max_iters(max_iters).fit(&case.x).unwrap();
        let labels = u32s(&fit.labels);
        let counted: Vec<_> = (0..case.k as u32).map(|j| labels.iter().filter(|&&l| l == j).count() as u32).collect();
        prop_assert_eq!(u32s(&fit.counts), counted);
    }

    #[test]
    fn a_finished_fit_stays_finished(case in case()) {
        let first = case.kmeans().max_iters(300).fit(&case.x).unwrap();
        if u32s(&first.converged) == [1] {
            let again = case.kmeans().init(Init::Given(first.centroids.clone())).fit(&case.x).unwrap();
            prop_assert_eq!(u32s(&again.labels), u32s(&first.labels));
            prop_assert_eq!(u32s(&again.n_iter), vec![1]);
        }
    }

    #[test]
    fn centroids_of_a_finished_fit_are_means(case in case()) {
        let fit = KMeans::new(case.k).tol(0.0).max_iters(300).fit(&case.x).unwrap();
        prop_assert_eq!(u32s(&fit.converged), vec![1]);
        let means = cluster_means(&case.x, &fit.labels, case.k).unwrap();
        let full: Vec<u32> = (0..case.k as u32).filter(|&j| u32s(&fit.counts)[j as usize] > 0).collect();
        prop_assert_eq!(bits(&pick(&means, &full)), bits(&pick(&fit.centroids, &full)));
    }

    #[test]
    fn one_more_centroid_takes_only_what_is_nearer(case in case()) {
        let more = Tensor::cat(&[&case.start(), &case.x.narrow(0, case.n() - 1, 1).unwrap()], 0).unwrap();
        let (before, after) = (labels(&case.x, &case.start(), case.metric), labels(&case.x, &more, case.metric));
        prop_assert!(before.iter().zip(&after).all(|(b, a)| a == b || *a as usize == case.k));
    }

    #[test]
    fn a_far_point_gets_a_cluster_of_its_own(case in case()) {
        let far = Tensor::full(1000f32, (1, case.x.dim(1).unwrap()), &Device::Cpu).unwrap();
        let far = far.to_device(case.x.device()).unwrap().to_dtype(case.x.dtype()).unwrap();
        let (x, start) = (Tensor::cat(&[&case.x, &far], 0).unwrap(), Tensor::cat(&[&case.start(), &far], 0).unwrap());
        let fit = KMeans::new(case.k + 1).init(Init::Given(start)).fit(&x).unwrap();
        prop_assert_eq!(u32s(&fit.counts)[case.k], 1);
        prop_assert_eq!(u32s(&fit.labels)[case.n()], case.k as u32);
    }
}
