//! Clusters taken for queries, and their tokens, against plain loops.

use crate::common::{self, *};
use candle_core::{DType, Device, Tensor};
use candle_flash_kmeans::{
    select_clusters, sort_by_cluster, top_rows_per_centroid, ClusterBudget, Error, Metric, Selection,
};
use rand::Rng;

/// The clusters of a query, best first, and how many of them are taken.
fn chosen(scores: &[f64], sizes: &[u32], take: ClusterBudget) -> (Vec<usize>, usize) {
    let k = scores.len();
    let key = |j: usize| match take {
        _ if sizes[j] == 0 || scores[j].is_nan() => f64::NEG_INFINITY,
        ClusterBudget::TopP { .. } => scores[j] + (sizes[j] as f64).ln(),
        _ => scores[j],
    };
    let mut ranking: Vec<usize> = (0..k).collect();
    ranking.sort_by(|&i, &j| key(j).total_cmp(&key(i)));
    let open = ranking.iter().filter(|&&j| key(j) > f64::NEG_INFINITY).count();
    let mass: Vec<f64> = ranking[..open].iter().map(|&j| (key(j) - key(ranking[0])).exp()).collect();
    let (mut taken, mut tokens, mut share) = (0, 0, 0.0);
    for (i, &j) in ranking[..open].iter().enumerate() {
        let more = match take {
            ClusterBudget::Within(budget) => tokens + sizes[j] as usize <= budget,
            ClusterBudget::Reaching(budget) => tokens < budget,
            ClusterBudget::TopP { p, floor } => {
                share < p * mass.iter().sum::<f64>() || i < (floor * k as f64).round() as usize
            }
            _ => unreachable!(),
        };
        if !more {
            break;
        }
        (taken, tokens, share) = (i + 1, tokens + sizes[j] as usize, share + mass[i]);
    }
    (ranking, taken)
}

#[test]
fn clusters_and_tokens_are_those_of_plain_loops() {
    let mut rng = rng(101);
    // Problems, queries of each, tokens, clusters.
    for (b, g, n, k) in [(1, 1, 1, 1), (2, 3, 100, 7), (3, 1, 1000, 40), (1, 4, 500, 1000), (2, 2, 70, 2)] {
        let labels: Vec<u32> = (0..b * n).map(|_| (k as f64 * rng.random_range(0f64..1.0).powi(2)) as u32).collect();
        let labels = Tensor::from_vec(labels, (b, n), &Device::Cpu).unwrap();
        for whole in [false, true] {
            let scores = match whole {
                // Many ties.
                true => integers(&[b, g, k], 3, DType::F32, &mut rng),
                false => uniform(&[b, g, k], 0.0, 4.0, DType::F32, &mut rng),
            };
            let mut values = f64s(&scores);
            values.iter_mut().step_by(5).for_each(|v| *v = f64::NEG_INFINITY);
            values.iter_mut().step_by(17).skip(1).for_each(|v| *v = f64::NAN);
            let scores = tensor(&[b, g, k], DType::F32, |i| values[i]);
            for take in [
                ClusterBudget::Within(n / 3),
                ClusterBudget::Within(usize::MAX),
                ClusterBudget::Reaching(0),
                ClusterBudget::Reaching(n / 4 + 1),
                ClusterBudget::TopP { p: 0.7, floor: 0.0 },
                ClusterBudget::TopP { p: 0.0, floor: 0.3 },
                ClusterBudget::TopP { p: 1.0, floor: 0.0 },
                ClusterBudget::TopP { p: 0.3, floor: 1.0 },
            ] {
                for device in devices() {
                    let what = format!("{b} {g} {n} {k} {take:?} on {:?}", device.location());
                    let (order, offsets) = sort_by_cluster(&labels.to_device(&device).unwrap(), k).unwrap();
                    let ends = offsets.to_vec2::<u32>().unwrap();
                    let sizes: Vec<Vec<u32>> =
                        ends.iter().map(|e| e.windows(2).map(|e| e[1] - e[0]).collect()).collect();
                    let counts = Tensor::new(sizes.clone(), &device).unwrap();
                    let got = select_clusters(&scores.to_device(&device).unwrap(), &counts, take).unwrap();
                    assert_eq!((got.mask.dims(), got.clusters.dims()), (&[b, g, k][..], &[b, g][..]));
                    for capacity in [1, n / 4 + 1, n + 3] {
                        let (indices, count) = got.indices(&order, &offsets, capacity).unwrap();
                        assert_eq!((indices.dims(), count.dims()), (&[b, g, capacity][..], &[b, g][..]));
                        let (indices, count) = (u32s(&indices), u32s(&count));
                        for q in 0..b * g {
                            let (ranking, taken) = chosen(&values[q * k..][..k], &sizes[q / g], take);
                            let of = |t: &Tensor| u32s(t)[q * k..][..k].to_vec();
                            assert_eq!(u32s(&got.clusters)[q] as usize, taken, "{what}");
                            assert!(of(&got.ranking).iter().map(|&j| j as usize).eq(ranking.iter().copied()), "{what}");
                            let mask = of(&got.mask);
                            assert!((0..k).all(|j| (mask[j] == 1) == ranking[..taken].contains(&j)), "{what}");
                            let labels = &labels.to_vec2::<u32>().unwrap()[q / g];
                            let members = |j: usize| (0..n as u32).filter(move |&i| labels[i as usize] as usize == j);
                            let mut want: Vec<u32> = ranking[..taken].iter().flat_map(|&j| members(j)).collect();
                            assert_eq!(u32s(&got.tokens)[q] as usize, want.len(), "{what}");
                            want.truncate(capacity);
                            assert_eq!(count[q] as usize, want.len(), "{what}");
                            want.resize(capacity, Selection::PADDING);
                            assert_eq!(indices[q * capacity..][..capacity], want, "{what}");
                        }
                    }
                }
            }
        }
    }
}

/// Scores of every float type, in any layout, and sizes that some queries share.
#[test]
fn scores_of_any_type_and_layout() {
    let mut rng = rng(102);
    for device in devices() {
        let sizes = Tensor::new(&[3u32, 0, 9, 4, 1, 7], &device).unwrap();
        for dtype in DTYPES {
            let scores = uniform(&[2, 5, 6], 0.0, 2.0, dtype, &mut rng).to_device(&device).unwrap();
            for take in [ClusterBudget::Within(12), ClusterBudget::TopP { p: 0.6, floor: 0.2 }] {
                let want = select_clusters(&scores, &sizes, take).unwrap();
                for Laid { name, view, .. } in layouts(&scores) {
                    let got = select_clusters(&view, &sizes, take).unwrap();
                    assert_same(&got.mask, &want.mask, &name);
                    assert_same(&got.ranking, &want.ranking, &name);
                }
                let each = sizes.broadcast_as((2, 6)).unwrap();
                assert_same(&select_clusters(&scores, &each, take).unwrap().mask, &want.mask, "of each problem");
            }
        }
    }
}

/// Many clusters, all equal: the order is that of their indices.
#[test]
fn equal_scores_go_by_index() {
    for (device, k) in devices().into_iter().flat_map(|device| [8192, 8193, 20_000].map(|k| (device.clone(), k))) {
        let (scores, sizes) = (ones(&[2, k], DType::F32, &device), ones(&[k], DType::U32, &device));
        let got = select_clusters(&scores, &sizes, ClusterBudget::Within(100)).unwrap();
        assert!(u32s(&got.ranking).into_iter().enumerate().all(|(i, j)| j as usize == i % k));
        assert_eq!((u32s(&got.clusters), u32s(&got.tokens)), (vec![100; 2], vec![100; 2]));
    }
}

/// More clusters and rows than Candle sorts at once on a GPU, with ties, NaN and empty ones among them.
#[test]
fn any_number_of_clusters_and_rows() {
    for (k, rows) in [(10_000, 3), (100_000, 2)] {
        let mut rng = rng(104);
        let mut values = f64s(&integers(&[rows, k], 3000, DType::F32, &mut rng));
        values.iter_mut().step_by(7).for_each(|v| *v = f64::NAN);
        let sizes: Vec<u32> = (0..k).map(|_| rng.random_range(0..3)).collect();
        let starts = sizes.iter().scan(0, |end, &size| {
            *end += size;
            Some(*end)
        });
        let offsets: Vec<u32> = [0].into_iter().chain(starts).collect();
        let tokens = offsets[k];
        for device in devices() {
            let scores = tensor(&[rows, k], DType::F32, |i| values[i]).to_device(&device).unwrap();
            let counts = Tensor::new(sizes.clone(), &device).unwrap();
            for take in [
                ClusterBudget::Within(500),
                ClusterBudget::Reaching(tokens as usize / 2),
                ClusterBudget::TopP { p: 0.5, floor: 0.001 },
            ] {
                let got = select_clusters(&scores, &counts, take).unwrap();
                let order = Tensor::arange(0, tokens, &device).unwrap();
                let (indices, count) =
                    got.indices(&order, &Tensor::new(offsets.clone(), &device).unwrap(), 600).unwrap();
                let (ranking, taken, indices) = (u32s(&got.ranking), u32s(&got.clusters), u32s(&indices));
                for q in 0..rows {
                    let (want, clusters) = chosen(&values[q * k..][..k], &sizes, take);
                    let what = format!("{k} clusters, query {q}, {take:?} on {:?}", device.location());
                    assert_eq!(taken[q] as usize, clusters, "{what}");
                    assert!(ranking[q * k..][..k].iter().zip(&want).all(|(&i, &j)| i as usize == j), "{what}");
                    let members = want[..clusters].iter().flat_map(|&j| offsets[j]..offsets[j + 1]);
                    let mut members: Vec<u32> = members.take(600).collect();
                    assert_eq!(u32s(&count)[q] as usize, members.len(), "{what}");
                    members.resize(600, Selection::PADDING);
                    assert_eq!(indices[q * 600..][..600], members, "{what}");
                }
            }
            let x = integers(&[k, 1], 1000, DType::F32, &mut common::rng(105)).to_device(&device).unwrap();
            let c = Tensor::new(&[[0.25f32], [400.25]], &device).unwrap();
            let near = u32s(&top_rows_per_centroid(&x, &c, 50, Metric::Manhattan).unwrap());
            for (got, c) in near.chunks(50).zip([0.25, 400.25]) {
                let x = f64s(&x);
                let mut want: Vec<usize> = (0..k).collect();
                want.sort_by(|&i, &j| (x[i] - c).abs().total_cmp(&(x[j] - c).abs()));
                assert!(got.iter().zip(&want).all(|(&i, &j)| i as usize == j), "{k} rows");
            }
        }
    }
}

/// Padding is no token: Candle's ops read zeros for it, and pass over it where they write.
#[test]
fn padding_reads_as_zeros() {
    for device in devices() {
        let indices = Tensor::new(&[2u32, 0, Selection::PADDING, Selection::PADDING], &device).unwrap();
        let x = Tensor::new(&[[1f32, 2.], [3., 4.], [5., 6.]], &device).unwrap();
        assert_eq!(f64s(&x.index_select(&indices, 0).unwrap()), [5., 6., 1., 2., 0., 0., 0., 0.]);
        assert_eq!(
            f64s(&x.get_on_dim(1, 0).unwrap().contiguous().unwrap().gather(&indices, 0).unwrap()),
            [5., 1., 0., 0.]
        );
        assert_eq!(u32s(&indices.ne(Selection::PADDING).unwrap()), [1, 1, 0, 0]);
        let ones = ones(&[4], DType::F32, &device);
        let marked = Tensor::zeros(3, DType::F32, &device).unwrap().index_add(&indices, &ones, 0).unwrap();
        assert_eq!(f64s(&marked), [1., 0., 1.]);
    }
}

/// Without queries or problems there is nothing to take; one cluster, no budget and sizes past a u32's sum are taken as any.
#[test]
fn the_ends_of_every_setting() {
    for device in devices() {
        let sizes = ones(&[3], DType::U32, &device);
        for (scores, sizes) in [
            (ones(&[0, 3], DType::F32, &device), &sizes),
            (ones(&[2, 0, 3], DType::F16, &device), &ones(&[2, 3], DType::U32, &device)),
        ] {
            let rows = &scores.dims()[..scores.rank() - 1];
            let got = select_clusters(&scores, sizes, ClusterBudget::Within(2)).unwrap();
            let dims = [&got.mask, &got.ranking, &got.clusters, &got.tokens].map(|t| t.dims().to_vec());
            assert_eq!(dims, [scores.dims().to_vec(), scores.dims().to_vec(), rows.to_vec(), rows.to_vec()]);
            let batch = &sizes.dims()[..sizes.rank() - 1];
            let lists = |columns| ones(&[batch, &[columns]].concat(), DType::U32, &device);
            let (indices, count) = got.indices(&lists(9), &lists(4), 5).unwrap();
            assert_eq!((indices.dims(), count.dims()), (&[rows, &[5]].concat()[..], rows));
        }
        let x = ones(&[0, 5, 3], DType::F32, &device);
        let top = top_rows_per_centroid(&x, &ones(&[2, 3], DType::F32, &device), 4, Metric::Dot).unwrap();
        assert_eq!((top.dims(), top.dtype()), (&[0, 2, 4][..], DType::U32));

        let one = Tensor::new(&[[f32::NAN], [f32::NEG_INFINITY], [f32::INFINITY], [-1e30]], &device).unwrap();
        for take in [ClusterBudget::Within(9), ClusterBudget::Reaching(1), ClusterBudget::TopP { p: 1.0, floor: 1.0 }] {
            let got = select_clusters(&one, &Tensor::new(&[7u32], &device).unwrap(), take).unwrap();
            assert_eq!((u32s(&got.clusters), u32s(&got.tokens)), (vec![0, 0, 1, 1], vec![0, 0, 7, 7]), "{take:?}");
        }
        let huge = Tensor::new(&[u32::MAX, u32::MAX, 1], &device).unwrap();
        let scores = Tensor::new(&[1f32, 2., 3.], &device).unwrap();
        for (take, clusters, tokens) in [
            (ClusterBudget::Within(0), 0, 0),
            (ClusterBudget::Reaching(0), 0, 0),
            (ClusterBudget::Within(usize::MAX), 3, u32::MAX),
            (ClusterBudget::Reaching(u32::MAX as usize + 1), 2, u32::MAX),
        ] {
            let got = select_clusters(&scores, &huge, take).unwrap();
            assert_eq!((u32s(&got.clusters), u32s(&got.tokens)), (vec![clusters], vec![tokens]), "{take:?}");
        }
        // An argument that is no order gives some of its values all the same.
        let got = select_clusters(&scores, &ones(&[3], DType::U32, &device), ClusterBudget::Within(3)).unwrap();
        let nonsense = Tensor::new(&[u32::MAX, 0, u32::MAX, 5], &device).unwrap();
        let (indices, _) = got.indices(&Tensor::new(&[8u32, 9], &device).unwrap(), &nonsense, 4).unwrap();
        assert!(u32s(&indices).iter().all(|i| [8, 9, Selection::PADDING].contains(i)));
        assert!(format!("{got:?}").contains("[3]") && !format!("{got:?}").contains("u32"));
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    for device in devices() {
        let (scores, sizes) = (ones(&[2, 3], DType::F32, &device), ones(&[2, 3], DType::U32, &device));
        let select = |scores: &Tensor, sizes: &Tensor| select_clusters(scores, sizes, ClusterBudget::Within(5));
        let says = |result: candle_flash_kmeans::Result<_>, variant: &str, part: &str| {
            let error: Error = result.map(|_: ()| ()).unwrap_err();
            let (name, text) = (format!("{error:?}"), error.to_string());
            assert!(name.starts_with(variant) && text.contains(part), "{name} {text}");
        };
        let refused = |scores: &Tensor, sizes: &Tensor, variant: &str, part: &str| {
            says(select(scores, sizes).map(|_| ()), variant, part)
        };
        refused(&ones(&[2, 0], DType::F32, &device), &ones(&[2, 0], DType::U32, &device), "Range", "k: 0");
        refused(&ones(&[0, 3], DType::F32, &device), &sizes, "Shape", "sizes: shape [2, 3], expected [0, 3]");
        refused(&sizes, &sizes, "DType", "scores: dtype U32");
        refused(&scores, &scores, "DType", "sizes: dtype F32, expected U32");
        refused(&scores, &ones(&[2, 4], DType::U32, &device), "Shape", "sizes: shape [2, 4], expected [2, 3]");
        refused(&scores, &ones(&[3, 3], DType::U32, &device), "Shape", "sizes: shape [3, 3], expected [2, 3]");
        refused(&Tensor::new(1f32, &device).unwrap(), &sizes, "Rank", "scores");
        for (p, floor, part) in [(1.5, 0.0, "p: 1.5"), (f64::NAN, 0.0, "p: NaN"), (0.5, -0.1, "floor: -0.1")] {
            says(select_clusters(&scores, &sizes, ClusterBudget::TopP { p, floor }).map(|_| ()), "Value", part);
        }
        let got = select(&scores, &sizes).unwrap();
        let (order, offsets) = (ones(&[2, 9], DType::U32, &device), ones(&[2, 4], DType::U32, &device));
        let indices = |order: &Tensor, offsets: &Tensor, capacity| got.indices(order, offsets, capacity).map(|_| ());
        says(indices(&order, &offsets, 0), "Range", "capacity: 0");
        says(indices(&order, &sizes, 4), "Shape", "offsets: shape [2, 3], expected [2, 4]");
        says(indices(&ones(&[3, 9], DType::U32, &device), &offsets, 4), "Shape", "order: shape [3, 9]");
        says(indices(&scores, &offsets, 4), "DType", "order: dtype F32");
        says(indices(&ones(&[2, 0], DType::U32, &device), &offsets, 4), "Range", "order: 0");
        // Nonsense is not searched for, and stays in range.
        let nonsense = Tensor::new(&[[9u32, 2, 77, 4], [1, 1, 0, 3]], &device).unwrap();
        let (tokens, count) = got.indices(&order, &nonsense, 4).unwrap();
        assert!(
            u32s(&tokens).iter().all(|&t| t <= 1 || t == Selection::PADDING) && u32s(&count).iter().all(|&c| c <= 4)
        );
    }
}

#[test]
fn top_rows_are_the_nearest_of_each_centroid() {
    let mut rng = rng(103);
    for (metric, dtype) in METRICS.into_iter().flat_map(|m| DTYPES.map(|t| (m, t))) {
        for (n, k, w) in [(1, 1, 1), (90, 7, 20), (90, 7, 90), (300, 40, 1)] {
            for shared in [false, true] {
                // Whole numbers: distances are exact in f32, but for cosine, and many are equal.
                let shape = [2, k, 3];
                let x = integers(&[2, n, 3], 4, dtype, &mut rng);
                let c = integers(if shared { &shape[1..] } else { &shape }, 4, dtype, &mut rng);
                let (xs, cs) = (problems(&x), problems(&c));
                for device in devices() {
                    let (x, c) = (x.to_device(&device).unwrap(), c.to_device(&device).unwrap());
                    let got = top_rows_per_centroid(&x, &c, w, metric).unwrap();
                    assert_eq!((got.dims(), got.dtype()), (&[2, k, w][..], DType::U32));
                    for (q, got) in u32s(&got).chunks(w).enumerate() {
                        let c = &cs[if shared { 0 } else { q / k }][q % k];
                        let store = |v: f64| if dtype == DType::F64 { v } else { v as f32 as f64 };
                        let far = |i: usize| store(naive::distance(&xs[q / k][i], c, metric));
                        let mut want: Vec<usize> = (0..n).collect();
                        want.sort_by(|&i, &j| far(i).total_cmp(&far(j)));
                        // The zeros of a dot product have two signs.
                        let same = got.iter().zip(&want).all(|(&i, &j)| far(i as usize) == far(j));
                        assert!(same, "{metric:?} {dtype:?} {n} {k} {w} on {:?}", device.location());
                        let falls = |i: &[u32]| far(i[0] as usize) == far(i[1] as usize) && i[0] >= i[1];
                        assert!(!got.windows(2).any(falls), "{metric:?} {dtype:?}: equal rows by index");
                    }
                }
            }
        }
    }
}

#[test]
fn top_rows_that_do_not_fit_are_refused() {
    for device in devices() {
        let (x, c) = (ones(&[5, 3], DType::F32, &device), ones(&[2, 3], DType::F32, &device));
        let top = |x: &Tensor, w| top_rows_per_centroid(x, &c, w, Metric::Dot).unwrap_err().to_string();
        assert!(top(&x, 0).contains("w: 0 is outside 1..=5"));
        assert!(top(&x, 6).contains("w: 6 is outside 1..=5"));
        assert!(top(&ones(&[5, 4], DType::F32, &device), 1).contains("centroids: columns is 3, expected 4"));
        // A row that is no number comes last.
        let x = tensor(&[5, 3], DType::F32, |i| if i == 4 { f64::NAN } else { 1.0 }).to_device(&device).unwrap();
        let got = top_rows_per_centroid(&x, &c, 5, Metric::SquaredEuclidean).unwrap();
        assert_eq!(u32s(&got), [0, 2, 3, 4, 1, 0, 2, 3, 4, 1]);
    }
}
