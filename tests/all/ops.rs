//! The ops as Candle's users apply them: the same bits as the functions, gradients, writing in place, and refusals.

use crate::common::*;
use candle_core::{CustomOp1, CustomOp2, DType, Device, InplaceOp3, Layout, MetalStorage, Tensor, Var};
use candle_flash_kmeans::{
    assign, cluster_means, cluster_sums,
    ops::{AssignInto, ClusterMeans, ClusterSums, FlashAssign, MeansInto, Quantize, SortInverse, SumsInto},
    quantize, sort_by_cluster, Error, Metric,
};

/// Rows, centroids and labels of a few shapes, with what they are called.
fn cases(device: &Device) -> Vec<(String, Tensor, Tensor, Tensor, usize)> {
    let mut rng = rng(71);
    let mut cases = vec![];
    for dtype in DTYPES {
        for (batch, n, k, d) in [(vec![], 200, 7, 5), (vec![2], 130, 12, 32), (vec![2, 2], 60, 9, 3)] {
            let shape = |end: &[usize]| [&batch[..], end].concat();
            let x = uniform(&shape(&[n, d]), 0.0, 1.0, dtype, &mut rng).to_device(device).unwrap();
            let c = uniform(&shape(&[k, d]), 0.0, 1.0, dtype, &mut rng).to_device(device).unwrap();
            let labels = assign(&x, &c, Metric::SquaredEuclidean).unwrap();
            cases.push((format!("{dtype:?} {batch:?} {n} {k} {d} on {device:?}"), x, c, labels, k));
        }
    }
    cases
}

#[test]
fn ops_are_the_functions() {
    for device in devices() {
        for (what, x, c, labels, k) in cases(&device) {
            for metric in METRICS {
                let got = x.apply_op2(&c, FlashAssign { metric }).unwrap();
                assert_same(&got, &assign(&x, &c, metric).unwrap(), &format!("{what} {metric:?}"));
                let got = x.apply_op2(&c, Quantize { metric }).unwrap();
                assert_same(&got, &quantize(&x, &c, metric).unwrap().0, &format!("{what} {metric:?}"));
            }
            let means = x.apply_op2(&labels, ClusterMeans { k }).unwrap();
            assert_same(&means, &cluster_means(&x, &labels, k).unwrap(), &what);
            let sums = x.apply_op2(&labels, ClusterSums { k }).unwrap();
            assert_same(&sums, &cluster_sums(&x, &labels, k).unwrap(), &what);
            let sorted = labels.apply_op1(SortInverse { k }).unwrap();
            let (order, offsets) = SortInverse { k }.split(&sorted, &labels).unwrap();
            let want = sort_by_cluster(&labels, k).unwrap();
            assert_same(&order, &want.0, &what);
            assert_same(&offsets, &want.1, &what);
            assert!(order.is_contiguous() && offsets.is_contiguous());
        }
    }
}

/// Storages come with layouts: each gives the bits of its contiguous copy.
#[test]
fn any_layout_gives_the_bits_of_its_copy() {
    let mut rng = rng(72);
    for device in devices() {
        for dtype in DTYPES {
            let x = uniform(&[2, 40, 16], 0.0, 1.0, dtype, &mut rng).to_device(&device).unwrap();
            let c = uniform(&[2, 6, 16], 0.0, 1.0, dtype, &mut rng).to_device(&device).unwrap();
            let labels = assign(&x, &c, Metric::Cosine).unwrap();
            let means = cluster_means(&x, &labels, 6).unwrap();
            for laid in layouts(&x) {
                let what = format!("{dtype:?} rows {} on {device:?}", laid.name);
                let got = laid.view.apply_op2(&c, FlashAssign { metric: Metric::Cosine }).unwrap();
                assert_same(&got, &labels, &what);
                assert_same(&laid.view.apply_op2(&labels, ClusterMeans { k: 6 }).unwrap(), &means, &what);
                let place = Tensor::zeros((2, 40), DType::U32, &device).unwrap();
                place.inplace_op3(&laid.view, &c, &AssignInto { metric: Metric::Cosine }).unwrap();
                assert_same(&place, &labels, &what);
            }
            for laid in layouts(&c) {
                let got = x.apply_op2(&laid.view, FlashAssign { metric: Metric::Cosine }).unwrap();
                assert_same(&got, &labels, &format!("{dtype:?} centroids {} on {device:?}", laid.name));
            }
            let shifted = Tensor::cat(&[&labels, &labels], 1).unwrap().narrow(1, 40, 40).unwrap();
            assert_same(&x.apply_op2(&shifted, ClusterMeans { k: 6 }).unwrap(), &means, "labels of a view");
        }
    }
}

#[test]
fn writing_ops_write_where_they_are_told() {
    for device in devices() {
        for (what, x, c, labels, k) in cases(&device) {
            let place = labels.zeros_like().unwrap();
            place.inplace_op3(&x, &c, &AssignInto::default()).unwrap();
            assert_same(&place, &labels, &what);

            // A step of Lloyd's loop: what has no rows stays.
            let last = k - 1;
            let moved = labels.minimum(last as u32 - 1).unwrap();
            let centroids = c.copy().unwrap();
            centroids.inplace_op3(&x, &moved, &MeansInto).unwrap();
            let means = cluster_means(&x, &moved, k).unwrap();
            let dim = c.rank() - 2;
            let of = |t: &Tensor, from: usize, count: usize| t.narrow(dim, from, count).unwrap().contiguous().unwrap();
            assert_same(&of(&centroids, last, 1), &of(&c, last, 1), &what);
            let empty = cluster_sums(&x.ones_like().unwrap(), &moved, k).unwrap();
            for (i, count) in f64s(&empty).chunks(*x.dims().last().unwrap()).map(|row| row[0]).enumerate() {
                let row = |t: &Tensor| {
                    let d = *t.dims().last().unwrap();
                    bits(&t.reshape(((), d)).unwrap().narrow(0, i, 1).unwrap())
                };
                let want = if count == 0.0 { row(&c) } else { row(&means) };
                assert_eq!(row(&centroids), want, "{what}: centroid {i}");
            }

            let sums = c.ones_like().unwrap();
            sums.inplace_op3(&x, &moved, &SumsInto).unwrap();
            assert_same(&sums, &cluster_sums(&x, &moved, k).unwrap(), &what);
        }
    }
}

/// A part of a larger tensor is written, and nothing beside it.
#[test]
fn writing_ops_leave_what_lies_beside() {
    let mut rng = rng(73);
    for device in devices() {
        let x = uniform(&[50, 8], 0.0, 1.0, DType::F32, &mut rng).to_device(&device).unwrap();
        let c = uniform(&[4, 8], 0.0, 1.0, DType::F32, &mut rng).to_device(&device).unwrap();
        let all = Tensor::full(9u32, 150, &device).unwrap();
        all.narrow(0, 50, 50).unwrap().inplace_op3(&x, &c, &AssignInto::default()).unwrap();
        let want = u32s(&assign(&x, &c, Metric::SquaredEuclidean).unwrap());
        assert_eq!(u32s(&all), [vec![9; 50], want, vec![9; 50]].concat());
    }
}

#[test]
fn gradients_are_those_of_the_functions() {
    let mut rng = rng(74);
    for device in devices() {
        let x = Var::from_tensor(&uniform(&[2, 30, 4], 0.0, 1.0, DType::F64, &mut rng).to_device(&device).unwrap());
        let x = x.unwrap();
        let c = uniform(&[2, 5, 4], 0.0, 1.0, DType::F64, &mut rng).to_device(&device).unwrap();
        let labels = x.apply_op2(&c, FlashAssign::default()).unwrap();
        let of_codes = uniform(&[2, 30, 4], 0.0, 1.0, DType::F64, &mut rng).to_device(&device).unwrap();
        let of_means = uniform(&[2, 5, 4], 0.0, 1.0, DType::F64, &mut rng).to_device(&device).unwrap();
        let grad = |f: &dyn Fn(&Tensor) -> Tensor, w: &Tensor| {
            let loss = (f(x.as_tensor()) * w).unwrap().sqr().unwrap().sum_all().unwrap();
            loss.backward().unwrap().get(&x).unwrap().clone()
        };
        let same = |op: &dyn Fn(&Tensor) -> Tensor, function: &dyn Fn(&Tensor) -> Tensor, w: &Tensor, what: &str| {
            assert_same(&grad(op, w), &grad(function, w), &format!("{what} on {device:?}"));
        };
        same(
            &|x| x.apply_op2(&c, Quantize::default()).unwrap(),
            &|x| quantize(x, &c, Metric::default()).unwrap().0,
            &of_codes,
            "quantize",
        );
        same(
            &|x| x.apply_op2(&labels, ClusterMeans { k: 5 }).unwrap(),
            &|x| cluster_means(x, &labels, 5).unwrap(),
            &of_means,
            "means",
        );
        same(
            &|x| x.apply_op2(&labels, ClusterSums { k: 5 }).unwrap(),
            &|x| cluster_sums(x, &labels, 5).unwrap(),
            &of_means,
            "sums",
        );
        // And by finite differences.
        let f = |x: &Tensor| {
            let means = x.apply_op2(&labels, ClusterMeans { k: 5 }).unwrap();
            f64s(&(means * &of_means).unwrap().sqr().unwrap().sum_all().unwrap())[0]
        };
        let got = f64s(&grad(&|x| x.apply_op2(&labels, ClusterMeans { k: 5 }).unwrap(), &of_means));
        let (values, h) = (f64s(&x), 1e-5);
        for i in (0..values.len()).step_by(7) {
            let at = |by: f64| {
                let mut v = values.clone();
                v[i] += by;
                f(&Tensor::from_vec(v, x.shape(), &device).unwrap())
            };
            approx::assert_abs_diff_eq!(got[i], (at(h) - at(-h)) / (2.0 * h), epsilon = 1e-7);
        }
        // No gradient flows into labels or centroids.
        let c = Var::from_tensor(&c).unwrap();
        let codes = x.apply_op2(c.as_tensor(), Quantize::default()).unwrap();
        assert!(codes.sum_all().unwrap().backward().unwrap().get(&c).is_none());
    }
}

/// The error of a refused op is that of the function.
#[test]
fn refusals_are_typed() {
    for device in devices() {
        let x = Tensor::zeros((10, 4), DType::F32, &device).unwrap();
        let narrow = Tensor::zeros((3, 5), DType::F32, &device).unwrap();
        let error = x.apply_op2(&narrow, FlashAssign::default()).unwrap_err();
        let ours = Error::from_candle(&error).unwrap_or_else(|| panic!("{error}"));
        let theirs = assign(&x, &narrow, Metric::default()).unwrap_err();
        assert_eq!(ours.to_string(), theirs.to_string());

        let labels = Tensor::full(7u32, 10, &device).unwrap();
        let error = x.apply_op2(&labels, ClusterMeans { k: 7 }).unwrap_err();
        assert!(matches!(Error::from_candle(&error), Some(Error::Range { argument: "labels", got: 7, .. })), "{error}");
        let error = labels.apply_op1(SortInverse { k: 7 }).unwrap_err();
        assert!(matches!(Error::from_candle(&error), Some(Error::Range { argument: "labels", got: 7, .. })), "{error}");

        let c = Tensor::zeros((3, 4), DType::F32, &device).unwrap();
        let error =
            Tensor::zeros(9, DType::U32, &device).unwrap().inplace_op3(&x, &c, &AssignInto::default()).unwrap_err();
        assert!(matches!(Error::from_candle(&error), Some(Error::Shape { argument: "labels", .. })), "{error}");
        let error =
            Tensor::zeros(10, DType::I64, &device).unwrap().inplace_op3(&x, &c, &AssignInto::default()).unwrap_err();
        assert!(matches!(Error::from_candle(&error), Some(Error::DType { argument: "labels", .. })), "{error}");
        let strided = Tensor::zeros((4, 3), DType::F32, &device).unwrap().t().unwrap();
        let error = strided.inplace_op3(&x, &labels.zeros_like().unwrap(), &MeansInto).unwrap_err();
        assert!(matches!(Error::from_candle(&error), Some(Error::Shape { .. } | Error::Conflict { .. })), "{error}");
        assert!(c.inplace_op3(&c, &labels, &MeansInto).is_err(), "an output that is an input");
    }
}

/// No rows, no problems, centroids that all problems share, and labels that lie anywhere.
#[test]
fn what_is_empty_shared_or_strided_is_taken() {
    let mut rng = rng(75);
    for device in devices() {
        let c = uniform(&[4, 3], 0.0, 1.0, DType::F32, &mut rng).to_device(&device).unwrap();
        for shape in [[2, 0, 3], [0, 5, 3]] {
            let x = Tensor::zeros((2, 5, 3), DType::F32, &device).unwrap();
            let x = x.narrow(0, 0, shape[0]).unwrap().narrow(1, 0, shape[1]).unwrap();
            let labels = x.apply_op2(&c, FlashAssign::default()).unwrap();
            assert_eq!(labels.dims(), &shape[..2]);
            assert_eq!(x.apply_op2(&c, Quantize::default()).unwrap().dims(), shape);
            let sums = x.apply_op2(&labels, ClusterSums { k: 4 }).unwrap();
            assert_eq!((sums.dims(), f64s(&sums)), (&[shape[0], 4, 3][..], vec![0.0; shape[0] * 12]));
            let op = SortInverse { k: 4 };
            let (order, offsets) = op.split(&labels.apply_op1(op).unwrap(), &labels).unwrap();
            assert_eq!((order.dims(), u32s(&offsets)), (&shape[..2], vec![0; shape[0] * 5]));
        }
        // A view of nothing that begins beyond the end of its storage.
        let labels =
            Tensor::zeros((2, 5), DType::U32, &device).unwrap().narrow(0, 2, 0).unwrap().narrow(1, 3, 0).unwrap();
        let none =
            Tensor::zeros((1, 1, 3), DType::F32, &device).unwrap().narrow(0, 0, 0).unwrap().narrow(1, 0, 0).unwrap();
        labels.inplace_op3(&none, &c, &AssignInto::default()).unwrap();
        let x = uniform(&[2, 5, 3], 0.0, 1.0, DType::F32, &mut rng).to_device(&device).unwrap();
        let each = c.broadcast_as((2, 4, 3)).unwrap().contiguous().unwrap();
        let labels = x.apply_op2(&each, FlashAssign::default()).unwrap();
        assert_same(&x.apply_op2(&c, FlashAssign::default()).unwrap(), &labels, "shared centroids");
        let strided = labels.t().unwrap().contiguous().unwrap().t().unwrap();
        let op = SortInverse { k: 4 };
        assert_same(&strided.apply_op1(op).unwrap(), &labels.apply_op1(op).unwrap(), "strided labels");
        let means = x.apply_op2(&labels, ClusterMeans { k: 4 }).unwrap();
        assert_same(&x.apply_op2(&strided, ClusterMeans { k: 4 }).unwrap(), &means, "strided labels");
    }
}

#[test]
fn no_op_is_on_metal() {
    let (s, l, device) =
        (MetalStorage, Layout::contiguous(1), |error: candle_core::Error| match Error::from_candle(&error) {
            Some(&Error::Unsupported { op, ref device }) => (op, device.clone()),
            _ => panic!("{error}"),
        });
    let refused = |op, error| assert_eq!(device(error), (op, "Metal".to_string()));
    refused("flash-assign", FlashAssign::default().metal_fwd(&s, &l, &s, &l).unwrap_err());
    refused("quantize", Quantize::default().metal_fwd(&s, &l, &s, &l).unwrap_err());
    refused("cluster-means", ClusterMeans { k: 2 }.metal_fwd(&s, &l, &s, &l).unwrap_err());
    refused("cluster-sums", ClusterSums { k: 2 }.metal_fwd(&s, &l, &s, &l).unwrap_err());
    refused("sort-inverse", SortInverse { k: 2 }.metal_fwd(&s, &l).unwrap_err());
    refused("assign-into", AssignInto::default().metal_fwd(&mut MetalStorage, &l, &s, &l, &s, &l).unwrap_err());
    refused("means-into", MeansInto.metal_fwd(&mut MetalStorage, &l, &s, &l, &s, &l).unwrap_err());
    refused("sums-into", SumsInto.metal_fwd(&mut MetalStorage, &l, &s, &l, &s, &l).unwrap_err());
}

/// A tensor that cannot be the result for these labels is not taken apart.
#[test]
fn another_sort_is_not_split() {
    let labels = Tensor::new(&[1u32, 0, 1], &Device::Cpu).unwrap();
    let sorted = labels.apply_op1(SortInverse { k: 2 }).unwrap();
    let error = SortInverse { k: 3 }.split(&sorted, &labels).unwrap_err();
    assert!(
        matches!(&error, Error::Shape { argument: "sorted", got, expected } if got == &[6] && expected == &[7]),
        "{error}"
    );
    let error = SortInverse { k: 2 }.split(&sorted.to_dtype(DType::I64).unwrap(), &labels).unwrap_err();
    assert!(matches!(error, Error::DType { argument: "sorted", got: DType::I64, .. }), "{error}");
}
