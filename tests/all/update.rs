//! The stable order and the means.

use crate::common::*;
use candle_core::{DType, Device, Tensor};
use candle_flash_kmeans::{
    cluster_means, cluster_sizes, cluster_sums, inverse_order, residuals, sort_by_cluster, testing, Init, KMeans,
    Metric,
};
use rand::{seq::SliceRandom, Rng};

fn random_labels(b: usize, n: usize, k: usize, rng: &mut impl Rng) -> Tensor {
    let labels: Vec<u32> = (0..b * n).map(|_| rng.random_range(0..k as u32)).collect();
    Tensor::from_vec(labels, (b, n), &Device::Cpu).unwrap()
}

#[test]
fn order_is_stable_and_offsets_bound_the_clusters() {
    let mut rng = rng(11);
    let shapes = [
        (1, 1, 1),
        (1, 5000, 1),
        (3, 257, 2),
        (2, 1000, 1000),
        (1, 100, 5000),
        (7, 33, 40),
        (1, 70_000, 3),
        (1, 9000, 4097),
    ];
    for device in devices() {
        for (b, n, k) in shapes {
            let labels = random_labels(b, n, k, &mut rng);
            let (order, offsets) = sort_by_cluster(&labels.to_device(&device).unwrap(), k).unwrap();
            assert_eq!((order.dims(), offsets.dims()), (&[b, n][..], &[b, k + 1][..]));
            let (order, offsets) = (order.to_vec2::<u32>().unwrap(), offsets.to_vec2::<u32>().unwrap());
            for (b, labels) in labels.to_vec2::<u32>().unwrap().iter().enumerate() {
                let mut want: Vec<u32> = (0..n as u32).collect();
                want.sort_by_key(|&i| labels[i as usize]);
                assert_eq!(order[b], want);
                let bound = |j: usize| labels.iter().filter(|&&l| (l as usize) < j).count() as u32;
                let sample = (0..=k).step_by(k.div_ceil(50)).chain([k]);
                sample.for_each(|j| assert_eq!(offsets[b][j], bound(j), "{b} {n} {k} {j}"));
            }
        }
        let none = ones(&[2, 0], DType::U32, &device);
        let (order, offsets) = sort_by_cluster(&none, 3).unwrap();
        assert_eq!((order.dims(), u32s(&offsets)), (&[2, 0][..], vec![0; 8]));
    }
}

/// An order that is there already gives the bits of the sort that an update makes by itself.
#[test]
fn an_order_gives_the_bits_of_its_labels() {
    let mut rng = rng(14);
    for (device, dtype) in devices().into_iter().flat_map(|device| DTYPES.map(|dtype| (device.clone(), dtype))) {
        for (b, n, k, d) in [(1, 5000, 1, 3), (3, 257, 20, 8), (2, 20_000, 300, 33), (1, 10_000, 9000, 2)] {
            let x = uniform(&[b, n, d], 0.0, 1.0, dtype, &mut rng).to_device(&device).unwrap();
            let labels = random_labels(b, n, k, &mut rng).to_device(&device).unwrap();
            let means = testing::Update::new(&x, k).unwrap().run(&labels).unwrap();
            let sorted = testing::Update::new(&x, k).unwrap().run_sorted(&labels).unwrap();
            assert_same(&sorted, &means, &format!("{b} {n} {k} {d} {dtype:?} on {:?}", device.location()));
        }
    }
}

/// Every number of clusters has its own tiles and memory.
#[test]
fn any_number_of_clusters_can_be_summed() {
    let mut rng = rng(13);
    for device in devices() {
        for n in [17_000, 9000] {
            for k in (1..=68).map(|i| 124 * i - 4) {
                let labels = random_labels(1, n, k, &mut rng);
                let x = tensor(&[1, n, 1], DType::F64, |i| (i % 1009) as f64);
                let means =
                    cluster_means(&x.to_device(&device).unwrap(), &labels.to_device(&device).unwrap(), k).unwrap();
                let (mut sums, mut counts) = (vec![0.0; k], vec![0.0; k]);
                for (i, label) in u32s(&labels).into_iter().enumerate() {
                    (sums[label as usize], counts[label as usize]) =
                        (sums[label as usize] + (i % 1009) as f64, counts[label as usize] + 1.0);
                }
                let expected: Vec<f64> =
                    sums.iter().zip(&counts).map(|(s, c)| if *c > 0.0 { s / c } else { 0.0 }).collect();
                assert_eq!(f64s(&means), expected, "{n} rows in {k} clusters on {:?}", device.location());
            }
        }
    }
}

/// Means of every shape against the specification: whole numbers to the bit, others to the last.
#[test]
fn means_are_rounded_once() {
    let mut rng = rng(12);
    for dtype in DTYPES {
        for (b, n, k, d) in [
            (1, 1, 1, 1),
            (2, 700, 5, 33),
            (1, 5000, 300, 130),
            (3, 1000, 1, 3),
            (1, 40, 60, 17),
            (1, 30_000, 2, 2),
            (17, 65, 3, 129),
            (1, 257, 9, 1000),
            (2, 33, 4, 2049),
        ] {
            let labels = random_labels(b, n, k, &mut rng);
            for whole in [false, true] {
                let x = match whole {
                    true => integers(&[b, n, d], 100, dtype, &mut rng),
                    false => uniform(&[b, n, d], 0.3, 1.0, dtype, &mut rng),
                };
                let (rows, of) = (problems(&x), labels.to_vec2::<u32>().unwrap());
                let zeros = vec![vec![0.0; d]; k];
                let mean = |b: usize| naive::update(&rows[b], &vec![1.0; n], &of[b], &zeros, Metric::SquaredEuclidean);
                let want: Vec<f64> = (0..b).flat_map(|b| mean(b).concat()).collect();
                for device in devices() {
                    let (x, labels) = (x.to_device(&device).unwrap(), labels.to_device(&device).unwrap());
                    let means = cluster_means(&x, &labels, k).unwrap();
                    assert_eq!((means.dims(), means.dtype()), (&[b, k, d][..], dtype));
                    for (got, &want) in f64s(&means).into_iter().zip(&want) {
                        // f64 has no wider type to divide in: the total and the quotient are rounded.
                        let allowed = if dtype == DType::F64 && !whole { 2.0 * ulp(want, dtype) } else { 0.0 };
                        let what =
                            format!("{got:e} for {want:e}, {dtype:?} {b} {n} {k} {d} on {:?}", device.location());
                        assert!((got - round(want, dtype)).abs() <= allowed, "{what}");
                    }
                }
            }
        }
    }
}

/// Means just above the middle of two neighbours, by less than f32 resolves: through f32 they round down.
#[test]
fn halves_are_rounded_once() {
    let n = 1 << 18;
    for (device, dtype) in
        devices().into_iter().flat_map(|device| [DType::F16, DType::BF16].map(|t| (device.clone(), t)))
    {
        let next = 1.0 + ulp(1.0, dtype);
        let x = tensor(&[n, 1], dtype, |i| if i <= n / 2 { next } else { 1.0 }).to_device(&device).unwrap();
        let labels = Tensor::zeros(n, DType::U32, &device).unwrap();
        assert_eq!(f64s(&cluster_means(&x, &labels, 1).unwrap()), [next], "{dtype:?} on {:?}", device.location());
        assert_eq!(f64s(&cluster_means(&x.neg().unwrap(), &labels, 1).unwrap()), [-next], "{dtype:?}");
    }
}

/// A term that is added and taken away again leaves no trace, however large it is.
/// Sums of single precision are tried in f64, which holds them exactly or not, as the terms of a column lie; those of the same rows in f64
/// are added up otherwise.
#[test]
fn sums_do_not_depend_on_how_they_are_added() {
    let mut rng = rng(17);
    let apart = |step: i32| (0..).map(move |i: i32| 2f32.powi(step * (i % 4)));
    for (n, d) in [(1, 1), (5, 3), (64, 16), (65, 7), (255, 40), (257, 33), (700, 128), (9000, 2)] {
        let normal: Vec<f32> =
            f64s(&uniform(&[n, d], 0.0, 1.0, DType::F32, &mut rng)).iter().map(|&v| v as f32).collect();
        let scaled = |step| normal.iter().zip(apart(step)).map(|(v, by)| v * by).collect::<Vec<_>>();
        let mut rows = vec![normal.clone(), scaled(8), scaled(20), scaled(-30)];
        // One term of a column, far from the others: large, subnormal, and cancelled.
        for odd in [1e30, 1e-42, f32::MAX] {
            let mut x = normal.clone();
            x[n / 2 * d] = odd;
            x[(n - 1) * d] = -odd;
            rows.push(x);
        }
        // Halves of even integers, of which the bits below the last that f64 holds decide.
        rows.push((0..n * d).map(|i| if i < d { 2f32.powi(60) } else { 1.0 + i as f32 * 2f32.powi(-20) }).collect());
        rows.push(vec![-0.0; n * d]);
        // A row that does not count.
        let mut x = normal.clone();
        x[n / 3 * d + d - 1] = f32::NAN;
        rows.push(x);
        for (case, x) in rows.into_iter().enumerate() {
            let x = Tensor::from_vec(x, (n, d), &Device::Cpu).unwrap();
            for k in [1, 3] {
                let labels = random_labels(1, n, k, &mut rng).flatten_all().unwrap();
                let wide = x.to_dtype(DType::F64).unwrap();
                for reduce in [cluster_sums, cluster_means] {
                    let want = reduce(&wide, &labels, k).unwrap().to_dtype(DType::F32).unwrap();
                    let got = reduce(&x, &labels, k).unwrap();
                    assert_same(&got, &want, &format!("{n} rows of {d} columns, case {case}, {k} clusters"));
                }
            }
        }
    }
}

#[test]
fn huge_terms_cancel() {
    for device in devices() {
        for dtype in [DType::BF16, DType::F32, DType::F64] {
            for (power, small) in [(60, 1.0), (80, 1.0), (60, 0.5), (-60, 2f64.powi(-120))] {
                let huge = 2f64.powi(power);
                for rows in
                    [vec![huge, small, -huge, small], vec![small, huge, small, -huge], vec![-huge, huge, small, small]]
                {
                    let x = tensor(&[4, 1], dtype, |i| rows[i]).to_device(&device).unwrap();
                    let labels = Tensor::zeros(4, DType::U32, &device).unwrap();
                    assert_eq!(f64s(&cluster_means(&x, &labels, 1).unwrap()), [small / 2.0], "{rows:?} {dtype:?}");
                }
            }
        }
    }
}

/// Equal rows have their own value as mean, in every binade of every type, and to the last row of 2^24 and more.
#[test]
fn equal_rows_are_their_mean() {
    for device in devices() {
        for dtype in DTYPES {
            for power in
                [-1074, -1050, -1022, -500, -149, -130, -126, -24, -20, -14, -1, 0, 10, 15, 100, 127, 900, 1000]
            {
                let odd = if power < -1022 { 1.0 } else { 1.0 + 2f64.powi(-7) };
                let v = tensor(&[1, 1], dtype, |_| -odd * 2f64.powi(power / 2) * 2f64.powi(power - power / 2));
                if f64s(&v)[0] == 0.0 || !f64s(&v)[0].is_finite() {
                    continue;
                }
                for n in [1, 2, 3, 1000] {
                    let x = v.broadcast_as((n, 1)).unwrap().to_device(&device).unwrap();
                    let mean = cluster_means(&x, &Tensor::zeros(n, DType::U32, &device).unwrap(), 1).unwrap();
                    let close = (f64s(&mean)[0] / f64s(&v)[0] - 1.0).abs() <= 2.0 * f64::EPSILON;
                    assert!(
                        close || bits(&mean) == bits(&v),
                        "{n} of {:e}: {:e}, {dtype:?}",
                        f64s(&v)[0],
                        f64s(&mean)[0]
                    );
                }
            }
        }
        let n = (1 << 24) + 8;
        let x = Tensor::full(3f32, (1, 1), &device).unwrap().broadcast_as((n, 1)).unwrap();
        assert_eq!(f64s(&cluster_means(&x, &Tensor::zeros(n, DType::U32, &device).unwrap(), 1).unwrap()), [3.0]);
    }
}

#[test]
fn permuted_rows_have_the_same_bits() {
    let mut rng = rng(13);
    for device in devices() {
        for dtype in DTYPES {
            let (n, k, d) = (20_000, 7, 19);
            // Magnitudes over forty octaves: f64 sums would depend on their order.
            let x: Vec<f64> =
                (0..n * d).map(|_| rng.random_range(-1.0..1.0) * 2f64.powi(rng.random_range(-25..15))).collect();
            let labels: Vec<u32> = (0..n).map(|_| rng.random_range(0..k as u32)).collect();
            let mut order: Vec<u32> = (0..n as u32).collect();
            order.shuffle(&mut rng);
            let x = Tensor::from_vec(x, (n, d), &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
            let labels = Tensor::from_vec(labels, n, &Device::Cpu).unwrap();
            let order = Tensor::from_vec(order, n, &Device::Cpu).unwrap();
            let means = |x: &Tensor, l: &Tensor| {
                cluster_means(&x.to_device(&device).unwrap(), &l.to_device(&device).unwrap(), k).unwrap()
            };
            let want = means(&x, &labels);
            let got = means(&x.index_select(&order, 0).unwrap(), &labels.index_select(&order, 0).unwrap());
            assert_eq!(bits(&got), bits(&want), "{dtype:?} {device:?}");
            assert_eq!(bits(&cluster_means(&x, &labels, k).unwrap()), bits(&want), "{dtype:?}: backends differ");
        }
    }
}

#[test]
fn a_huge_row_leaves_other_clusters_alone() {
    for device in devices() {
        let x = Tensor::new(&[[1e12f32, -1e12], [0.1, 0.2], [0.3, 0.4], [1e-20, -1e-20]], &device).unwrap();
        let labels = Tensor::new(&[0u32, 1, 1, 2], &device).unwrap();
        let means = cluster_means(&x, &labels, 3).unwrap().to_vec2::<f32>().unwrap();
        let mean = |a: f32, b: f32| ((a as f64 + b as f64) / 2.0) as f32;
        assert_eq!(means, [[1e12, -1e12], [mean(0.1, 0.3), mean(0.2, 0.4)], [1e-20, -1e-20]]);
    }
}

#[test]
fn sums_beyond_the_dtype_do_not_overflow() {
    for device in devices() {
        for dtype in DTYPES {
            // The total itself is an f64.
            let largest =
                [65504.0, 3.3e38, f32::MAX as f64, f64::MAX / 8192.0][DTYPES.iter().position(|&t| t == dtype).unwrap()];
            let x = Tensor::full(largest, (5000, 2), &device).unwrap().to_dtype(dtype).unwrap();
            let means = cluster_means(&x, &Tensor::zeros(5000, DType::U32, &device).unwrap(), 1).unwrap();
            for (mean, v) in f64s(&means).into_iter().zip(f64s(&x)) {
                // f64 has no wider type to divide in: the total and the quotient are rounded.
                let error = if dtype == DType::F64 { 2.0 * f64::EPSILON } else { 0.0 };
                assert!((mean / v - 1.0).abs() <= error, "{mean} {dtype:?} on {:?}", device.location());
            }
        }
    }
}

/// Neither a count nor a sum may be an f32, which stops counting at 2^24.
#[test]
fn counts_past_24_bits() {
    for device in devices() {
        let n = (1usize << 24) + 3;
        let labels = Tensor::zeros(n, DType::U32, &device).unwrap();
        let ones = Tensor::ones((n - 3, 1), DType::F32, &device).unwrap();
        let x = Tensor::cat(&[&ones, &Tensor::zeros((3, 1), DType::F32, &device).unwrap()], 0).unwrap();
        let mean = f64s(&cluster_means(&x, &labels, 2).unwrap());
        assert_eq!(mean, [1.0 - 3.0 / (1u32 << 24) as f64, 0.0], "{:?}", device.location());
        let start = Tensor::new(&[[0.9f32], [9.0]], &device).unwrap();
        let fit = KMeans::new(2).init(Init::Given(start)).fit(&x).unwrap();
        assert_eq!(u32s(&fit.counts), [n as u32, 0]);
    }
}

/// Sums of other rows than were labelled, of any width, rounded once.
#[test]
fn sums_and_sizes_follow_the_labels() {
    let mut rng = rng(14);
    for dtype in DTYPES {
        for (b, n, k, d) in [(1, 1, 1, 1), (2, 700, 5, 33), (3, 1000, 1, 3), (1, 40, 60, 17), (2, 3000, 300, 8)] {
            let (labels, x) = (random_labels(b, n, k, &mut rng), uniform(&[b, n, d], 0.3, 1.0, dtype, &mut rng));
            let (rows, of) = (problems(&x), labels.to_vec2::<u32>().unwrap());
            let members = |b: usize, j: usize| (0..n).filter(|&i| of[b][i] as usize == j).collect::<Vec<_>>();
            let clusters: Vec<_> = (0..b).flat_map(|b| (0..k).map(move |j| (b, j))).collect();
            let sizes: Vec<_> = clusters.iter().map(|&(b, j)| members(b, j).len() as u32).collect();
            let total = |b: usize, j: usize, c: usize| sum(members(b, j).iter().map(|&i| rows[b][i][c]));
            let want: Vec<_> = clusters
                .iter()
                .flat_map(|&(b, j)| (0..d).map(move |c| (b, j, c)))
                .map(|(b, j, c)| total(b, j, c))
                .collect();
            for device in devices() {
                let (x, labels) = (x.to_device(&device).unwrap(), labels.to_device(&device).unwrap());
                let counted = cluster_sizes(&labels, k).unwrap();
                assert_eq!((counted.dims(), u32s(&counted)), (&[b, k][..], sizes.clone()));
                let sums = cluster_sums(&x, &labels, k).unwrap();
                assert_eq!((sums.dims(), sums.dtype()), (&[b, k, d][..], dtype));
                for (got, &want) in f64s(&sums).into_iter().zip(&want) {
                    let allowed = if dtype == DType::F64 { ulp(want, dtype) } else { 0.0 };
                    assert!((got - round(want, dtype)).abs() <= allowed, "{got:e} for {want:e} {dtype:?} {device:?}");
                }
            }
        }
    }
}

#[test]
fn inverse_order_undoes_an_order() {
    let mut rng = rng(15);
    for device in devices() {
        for (b, n, k) in [(1, 1, 1), (3, 257, 2), (2, 1000, 40), (1, 70_000, 3)] {
            let (order, _) = sort_by_cluster(&random_labels(b, n, k, &mut rng).to_device(&device).unwrap(), k).unwrap();
            let inverse = inverse_order(&order).unwrap();
            assert_eq!((inverse.dims(), inverse.dtype()), (&[b, n][..], DType::U32));
            let pairs = order.to_vec2::<u32>().unwrap().into_iter().zip(inverse.to_vec2::<u32>().unwrap());
            pairs.for_each(|(order, inverse)| (0..n).for_each(|i| assert_eq!(inverse[order[i] as usize], i as u32)));
        }
        // A layout of its own, no rows, and no permutation.
        let order = Tensor::new(&[[2u32, 0], [0, 1], [1, 2]], &device).unwrap().t().unwrap();
        assert_eq!(inverse_order(&order).unwrap().to_vec2::<u32>().unwrap(), [[1, 2, 0], [0, 1, 2]]);
        assert_eq!(inverse_order(&ones(&[2, 0], DType::U32, &device)).unwrap().dims(), [2, 0]);
        assert!(u32s(&inverse_order(&Tensor::new(&[9u32, 1, 1], &device).unwrap()).unwrap()).iter().all(|&i| i < 3));
    }
}

#[test]
fn residuals_are_what_centroids_leave() {
    let mut rng = rng(16);
    for dtype in DTYPES {
        for shared in [false, true] {
            let x = uniform(&[2, 50, 7], 0.3, 1.0, dtype, &mut rng);
            let c = uniform(if shared { &[6, 7] } else { &[2, 6, 7] }, 0.3, 1.0, dtype, &mut rng);
            let (labels, cs) = (random_labels(2, 50, 6, &mut rng), problems(&c));
            let mut want = vec![];
            for (b, (x, labels)) in problems(&x).iter().zip(labels.to_vec2::<u32>().unwrap()).enumerate() {
                let of = &cs[if shared { 0 } else { b }];
                for (x, l) in x.iter().zip(labels) {
                    want.extend(x.iter().zip(&of[l as usize]).map(|(x, c)| round(x - c, dtype)));
                }
            }
            for device in devices() {
                let [x, c, labels] = [&x, &c, &labels].map(|t| t.to_device(&device).unwrap());
                let got = residuals(&x, &c, &labels).unwrap();
                assert_eq!((got.dims(), got.dtype(), f64s(&got)), (x.dims(), dtype, want.clone()));
            }
        }
    }
}
