//! Gradients against finite differences, in f64.

use crate::common::*;
use candle_core::{DType, Tensor, Var};
use candle_flash_kmeans::{cluster_means, cluster_sums, quantize, residuals, Metric};

#[test]
fn cluster_means_match_finite_differences() {
    let mut rng = rng(21);
    for device in devices() {
        for batch in [vec![], vec![2], vec![2, 2]] {
            let shape = [&batch[..], &[6, 3]].concat();
            let x =
                Var::from_tensor(&uniform(&shape, 0.0, 1.0, DType::F64, &mut rng).to_device(&device).unwrap()).unwrap();
            let n = x.elem_count() / 3;
            // Cluster 2 is empty.
            let labels: Vec<u32> = (0..n as u32).map(|i| [0, 3, 1, 0, 3, 3][i as usize % 6]).collect();
            let labels = Tensor::from_vec(labels, [&batch[..], &[6]].concat(), &device).unwrap();
            let weights =
                uniform(&[&batch[..], &[4, 3]].concat(), 0.0, 1.0, DType::F64, &mut rng).to_device(&device).unwrap();
            let loss = |x: &Tensor| {
                (cluster_means(x, &labels, 4).unwrap().sqr().unwrap() * &weights).unwrap().sum_all().unwrap()
            };
            let grad = loss(x.as_tensor()).backward().unwrap().get(&x).unwrap().clone();
            assert_eq!(grad.dims(), x.dims());
            let (values, grad, h) = (f64s(&x), f64s(&grad), 1e-5);
            for i in 0..values.len() {
                let at = |by: f64| {
                    let mut v = values.clone();
                    v[i] += by;
                    f64s(&loss(&Tensor::from_vec(v, shape.clone(), &device).unwrap()))[0]
                };
                approx::assert_abs_diff_eq!(grad[i], (at(h) - at(-h)) / (2.0 * h), epsilon = 1e-8);
            }
        }
    }
}

#[test]
fn quantize_passes_gradients_straight_through() {
    let mut rng = rng(22);
    for device in devices() {
        for dtype in [DType::F32, DType::F64] {
            let x =
                Var::from_tensor(&uniform(&[2, 20, 4], 0.0, 1.0, dtype, &mut rng).to_device(&device).unwrap()).unwrap();
            let c = Var::from_tensor(&uniform(&[5, 4], 0.0, 1.0, dtype, &mut rng).to_device(&device).unwrap()).unwrap();
            let weights = uniform(&[2, 20, 4], 0.0, 1.0, dtype, &mut rng).to_device(&device).unwrap();
            let (values, _) = quantize(x.as_tensor(), c.as_tensor(), Metric::SquaredEuclidean).unwrap();
            let plain = quantize(&x.detach(), &c.detach(), Metric::SquaredEuclidean).unwrap().0;
            assert_eq!(bits(&values), bits(&plain), "in the graph and out of it");
            let grads = (values * &weights).unwrap().sum_all().unwrap().backward().unwrap();
            assert_eq!(bits(grads.get(&x).unwrap()), bits(&weights));
            assert!(grads.get(&c).is_none(), "centroids are constants");
        }
    }
}

/// Gradients reach the variable through views, of half types too.
#[test]
fn gradients_pass_through_views() {
    let mut rng = rng(23);
    for (device, dtype) in
        devices().into_iter().flat_map(|device| [DType::F32, DType::F64].map(|t| (device.clone(), t)))
    {
        let x = Var::from_tensor(&uniform(&[4, 9, 6], 0.0, 1.0, dtype, &mut rng).to_device(&device).unwrap()).unwrap();
        let labels = Tensor::from_vec((0..36).map(|i| i * 7 % 5).collect::<Vec<u32>>(), (9, 4), &device).unwrap();
        let view = x.transpose(0, 1).unwrap().narrow(2, 1, 3).unwrap();
        let sum = |t: &Tensor| t.sum_all().unwrap().backward().unwrap().get(&x).unwrap().clone();
        let (through, copied) = (
            sum(&cluster_means(&view, &labels, 5).unwrap()),
            sum(&cluster_means(&view.contiguous().unwrap(), &labels, 5).unwrap()),
        );
        assert_same(&through, &copied, "means");
        let c = uniform(&[5, 3], 0.0, 1.0, dtype, &mut rng).to_device(&device).unwrap();
        let straight = sum(&quantize(&view, &c, Metric::Cosine).unwrap().0);
        let inside = |i: usize| (1..4).contains(&(i % 6));
        assert!(f64s(&straight).into_iter().enumerate().all(|(i, g)| g == inside(i) as u8 as f64));
    }
}

/// A row gets its cluster's gradient from a sum, and its own from a residual.
#[test]
fn sums_and_residuals_pass_gradients_whole() {
    let mut rng = rng(24);
    for (device, dtype) in
        devices().into_iter().flat_map(|device| [DType::F32, DType::F64].map(|t| (device.clone(), t)))
    {
        let x = Var::from_tensor(&uniform(&[2, 20, 4], 0.0, 1.0, dtype, &mut rng).to_device(&device).unwrap()).unwrap();
        let labels = Tensor::from_vec((0..40).map(|i| i * 7 % 5).collect::<Vec<u32>>(), (2, 20), &device).unwrap();
        let weights = uniform(&[2, 6, 4], 0.0, 1.0, dtype, &mut rng).to_device(&device).unwrap();
        let grad = |t: Tensor| t.sum_all().unwrap().backward().unwrap().get(&x).unwrap().clone();
        let got = problems(&grad((cluster_sums(&x, &labels, 6).unwrap() * &weights).unwrap()));
        for (b, (weights, labels)) in problems(&weights).iter().zip(labels.to_vec2::<u32>().unwrap()).enumerate() {
            let want: Rows = labels.iter().map(|&l| weights[l as usize].clone()).collect();
            assert_eq!(got[b], want);
        }
        let c = uniform(&[5, 4], 0.0, 1.0, dtype, &mut rng).to_device(&device).unwrap();
        assert!(f64s(&grad(residuals(&x, &c, &labels).unwrap())).into_iter().all(|g| g == 1.0));
    }
}
