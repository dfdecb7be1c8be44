//! Relations between runs that must hold whatever the data.

mod common;

use candle_core::{DType, Device, Tensor};
use candle_flash_kmeans::{assign, cluster_means, Init, KMeans, Metric};
use common::*;
use proptest::prelude::*;

fn index(i: Vec<u32>) -> Tensor {
    let n = i.len();
    Tensor::from_vec(i, n, &Device::Cpu).unwrap()
}

prop_compose! {
    /// Rows, a number of clusters, a metric and a dtype.
    fn case()(seed in 0u64.., n in 2usize..200, d in 1usize..40, k in 1usize..20, m in 0usize..4, t in 0usize..4)
        -> (Tensor, usize, Metric, u64) {
        (uniform(&[n, d], 0.5, 2.0, DTYPES[t], &mut rng(seed)), k.min(n), METRICS[m], seed)
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..Default::default() })]

    #[test]
    fn permuted_rows_permute_labels((x, k, metric, seed) in case()) {
        let n = x.dim(0).unwrap();
        let order: Vec<u32> = (0..n as u32).map(|i| (i * 7919 + seed as u32 % 97) % n as u32).collect();
        let c = x.narrow(0, 0, k).unwrap();
        let labels = u32s(&assign(&x, &c, metric).unwrap());
        let permuted = u32s(&assign(&x.index_select(&index(order.clone()), 0).unwrap(), &c, metric).unwrap());
        prop_assert!(order.iter().zip(permuted).all(|(&i, l)| labels[i as usize] == l));
    }

    #[test]
    fn reversed_centroids_reverse_labels((x, k, metric, _) in case()) {
        let c = x.narrow(0, 0, k).unwrap();
        let back = c.index_select(&index((0..k as u32).rev().collect()), 0).unwrap();
        let (a, b) = (u32s(&assign(&x, &c, metric).unwrap()), u32s(&assign(&x, &back, metric).unwrap()));
        let (rows, centroids) = (problems(&x).remove(0), problems(&c).remove(0));
        for (i, (a, b)) in a.into_iter().zip(b).enumerate() {
            // Equal distances go to the lowest index on both sides, which are different centroids.
            let at = |j: u32| naive::distance(&rows[i], &centroids[j as usize], metric);
            prop_assert!(a == k as u32 - 1 - b || at(a) == at(k as u32 - 1 - b));
        }
    }

    #[test]
    fn powers_of_two_change_no_label((x, k, metric, _) in case(), power in -6i32..4) {
        let c = x.narrow(0, 0, k).unwrap();
        let scaled = |t: &Tensor| (t.to_dtype(DType::F64).unwrap() * 2f64.powi(power)).unwrap();
        let wide = |t: &Tensor| t.to_dtype(DType::F64).unwrap();
        prop_assert_eq!(
            u32s(&assign(&scaled(&x), &scaled(&c), metric).unwrap()),
            u32s(&assign(&wide(&x), &wide(&c), metric).unwrap())
        );
        let fit = |x: &Tensor| KMeans::new(k).metric(metric).max_iters(4).tol(0.0).fit(x).unwrap();
        let (one, other) = (fit(&wide(&x)), fit(&scaled(&x)));
        prop_assert_eq!(u32s(&one.labels), u32s(&other.labels));
        if metric != Metric::Cosine {
            prop_assert_eq!(bits(&(one.centroids * 2f64.powi(power)).unwrap()), bits(&other.centroids));
        }
    }

    #[test]
    fn whole_numbers_may_be_shifted((_, k, _, seed) in case(), shift in -1000i32..1000) {
        let x = integers(&[100, 5], 20, DType::F32, &mut rng(seed));
        for metric in [Metric::SquaredEuclidean, Metric::Manhattan] {
            let c = x.narrow(0, 0, k).unwrap();
            let (y, e) = ((&x + shift as f64).unwrap(), (&c + shift as f64).unwrap());
            prop_assert_eq!(u32s(&assign(&x, &c, metric).unwrap()), u32s(&assign(&y, &e, metric).unwrap()));
        }
    }

    #[test]
    fn data_given_twice_clusters_alike((x, k, metric, _) in case()) {
        let twice = Tensor::cat(&[&x, &x], 0).unwrap();
        let fit = |x: &Tensor, c: &Tensor| KMeans::new(k).metric(metric).init(Init::Given(c.clone())).max_iters(5).tol(0.0).fit(x).unwrap();
        let c = x.narrow(0, 0, k).unwrap();
        let (one, two) = (fit(&x, &c), fit(&twice, &c));
        let labels = u32s(&one.labels);
        prop_assert_eq!(u32s(&two.labels), [&labels[..], &labels[..]].concat());
        prop_assert_eq!(bits(&one.centroids), bits(&two.centroids));
    }

    #[test]
    fn pieces_are_labelled_as_the_whole((x, k, metric, seed) in case()) {
        let n = x.dim(0).unwrap();
        let model = KMeans::new(k).metric(metric).fit(&x).unwrap();
        let cut = 1 + seed as usize % (n - 1);
        let pieces = [model.predict(&x.narrow(0, 0, cut).unwrap()), model.predict(&x.narrow(0, cut, n - cut).unwrap())];
        prop_assert_eq!(pieces.map(|p| u32s(&p.unwrap())).concat(), u32s(&model.labels));
    }

    #[test]
    fn a_finished_fit_stays_finished((x, k, metric, _) in case()) {
        let first = KMeans::new(k).metric(metric).tol(0.0).max_iters(300).fit(&x).unwrap();
        if first.converged.to_scalar::<u8>().unwrap() == 1 {
            let again = KMeans::new(k).metric(metric).tol(0.0).init(Init::Given(first.centroids.clone())).fit(&x).unwrap();
            prop_assert_eq!(u32s(&again.labels), u32s(&first.labels));
            prop_assert_eq!(u32s(&again.n_iter), vec![1]);
        }
    }

    #[test]
    fn centroids_of_a_finished_fit_are_means((x, k, _, _) in case()) {
        let fit = KMeans::new(k).tol(0.0).max_iters(300).fit(&x).unwrap();
        prop_assert_eq!(fit.converged.to_scalar::<u8>().unwrap(), 1);
        let means = cluster_means(&x, &fit.labels, k).unwrap();
        let full: Vec<u32> = u32s(&fit.counts).iter().enumerate().filter(|(_, &c)| c > 0).map(|(j, _)| j as u32).collect();
        let pick = |t: &Tensor| bits(&t.index_select(&index(full.clone()), 0).unwrap());
        prop_assert_eq!(pick(&means), pick(&fit.centroids));
    }
}
