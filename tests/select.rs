//! Clusters taken for queries, and their tokens, against plain loops.

mod common;

use candle_core::{DType, Device, Tensor};
use candle_flash_kmeans::{select_clusters, sort_by_cluster, top_rows_per_centroid, Error, Metric, Take};
use common::*;
use rand::Rng;

/// The clusters of a query, best first, and how many of them are taken.
fn chosen(scores: &[f64], sizes: &[u32], take: Take) -> (Vec<usize>, usize) {
    let k = scores.len();
    let key = |j: usize| match take {
        _ if sizes[j] == 0 || scores[j].is_nan() => f64::NEG_INFINITY,
        Take::TopP { .. } => scores[j] + (sizes[j] as f64).ln(),
        _ => scores[j],
    };
    let mut ranking: Vec<usize> = (0..k).collect();
    ranking.sort_by(|&i, &j| key(j).total_cmp(&key(i)));
    let open = ranking.iter().filter(|&&j| key(j) > f64::NEG_INFINITY).count();
    let mass: Vec<f64> = ranking[..open].iter().map(|&j| (key(j) - key(ranking[0])).exp()).collect();
    let (mut taken, mut tokens, mut share) = (0, 0, 0.0);
    for (i, &j) in ranking[..open].iter().enumerate() {
        let more = match take {
            Take::Within(budget) => tokens + sizes[j] as usize <= budget,
            Take::Reaching(budget) => tokens < budget,
            Take::TopP { p, floor } => share < p * mass.iter().sum::<f64>() || i < (floor * k as f64).round() as usize,
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
                Take::Within(n / 3),
                Take::Within(usize::MAX),
                Take::Reaching(0),
                Take::Reaching(n / 4 + 1),
                Take::TopP { p: 0.7, floor: 0.0 },
                Take::TopP { p: 0.0, floor: 0.3 },
                Take::TopP { p: 1.0, floor: 0.0 },
                Take::TopP { p: 0.3, floor: 1.0 },
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
                            want.resize(capacity, 0);
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
            for take in [Take::Within(12), Take::TopP { p: 0.6, floor: 0.2 }] {
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

/// As many clusters as can be, all equal: the order is that of their indices.
#[test]
fn equal_scores_go_by_index() {
    for device in devices() {
        let k = 8192;
        let (scores, sizes) = (ones(&[2, k], DType::F32, &device), ones(&[k], DType::U32, &device));
        let got = select_clusters(&scores, &sizes, Take::Within(100)).unwrap();
        assert!(u32s(&got.ranking).into_iter().enumerate().all(|(i, j)| j as usize == i % k));
        assert_eq!((u32s(&got.clusters), u32s(&got.tokens)), (vec![100; 2], vec![100; 2]));
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    for device in devices() {
        let (scores, sizes) = (ones(&[2, 3], DType::F32, &device), ones(&[2, 3], DType::U32, &device));
        let select = |scores: &Tensor, sizes: &Tensor| select_clusters(scores, sizes, Take::Within(5));
        let says = |result: candle_flash_kmeans::Result<_>, variant: &str, part: &str| {
            let error: Error = result.map(|_: ()| ()).unwrap_err();
            let (name, text) = (format!("{error:?}"), error.to_string());
            assert!(name.starts_with(variant) && text.contains(part), "{name} {text}");
        };
        let refused = |scores: &Tensor, sizes: &Tensor, variant: &str, part: &str| {
            says(select(scores, sizes).map(|_| ()), variant, part)
        };
        refused(&ones(&[8193], DType::F32, &device), &ones(&[8193], DType::U32, &device), "TooLarge", "k: 8193");
        refused(&ones(&[2, 0], DType::F32, &device), &ones(&[2, 0], DType::U32, &device), "Range", "k: 0");
        refused(&ones(&[0, 3], DType::F32, &device), &sizes, "Range", "scores rows: 0");
        refused(&sizes, &sizes, "DType", "scores: dtype U32");
        refused(&scores, &scores, "DType", "sizes: dtype F32, expected U32");
        refused(&scores, &ones(&[2, 4], DType::U32, &device), "Shape", "sizes: shape [2, 4], expected [2, 3]");
        refused(&scores, &ones(&[3, 3], DType::U32, &device), "Shape", "sizes: shape [3, 3], expected [2, 3]");
        refused(&Tensor::new(1f32, &device).unwrap(), &sizes, "Rank", "scores");
        for (p, floor, part) in [(1.5, 0.0, "p: 1.5"), (f64::NAN, 0.0, "p: NaN"), (0.5, -0.1, "floor: -0.1")] {
            says(select_clusters(&scores, &sizes, Take::TopP { p, floor }).map(|_| ()), "Value", part);
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
        assert!(u32s(&tokens).iter().all(|&t| t <= 1) && u32s(&count).iter().all(|&c| c <= 4));
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
        assert!(top(&ones(&[8193, 3], DType::F32, &device), 1).contains("x rows: 8193 exceeds the limit of 8192"));
        assert!(top(&ones(&[5, 4], DType::F32, &device), 1).contains("centroids: columns is 3, expected 4"));
        // A row that is no number comes last.
        let x = tensor(&[5, 3], DType::F32, |i| if i == 4 { f64::NAN } else { 1.0 }).to_device(&device).unwrap();
        let got = top_rows_per_centroid(&x, &c, 5, Metric::SquaredEuclidean).unwrap();
        assert_eq!(u32s(&got), [0, 2, 3, 4, 1, 0, 2, 3, 4, 1]);
    }
}
