//! Every assignment kernel, by name, whatever the plan would choose: the same exact labels from all.

use crate::common::*;
use candle_core::{DType, Tensor};
use candle_flash_kmeans::{assign, testing, Metric};
use rand::Rng;
use rand_chacha::ChaCha8Rng;

/// Assigns on every device with every kernel that can, and compares with the specification.
#[track_caller]
fn check(x: &Tensor, c: &Tensor, metric: Metric, what: &str) {
    let want = spec_labels(x, c, metric);
    for device in devices() {
        let (x, c) = (x.to_device(&device).unwrap(), c.to_device(&device).unwrap());
        for kernel in testing::candidates(&x, c.dims()[c.rank() - 2], metric).unwrap() {
            testing::force(Some(kernel));
            testing::launches();
            let labels = assign(&x, &c, metric).unwrap();
            let launched = testing::launches();
            testing::force(None);
            let what = format!("{what}: {:?} {:?} {:?} {metric:?} by {kernel}", x.dims(), c.dims(), x.dtype());
            let wrong = u32s(&labels).iter().zip(&want).filter(|(a, b)| a != b).count();
            assert_eq!(wrong, 0, "{what}: of {} labels", want.len());
            assert!(launched.iter().any(|l| l.starts_with(kernel)), "{what}: {launched:?}");
        }
    }
}

/// Tensor cores multiply these: f32 as pairs of halves.
const TYPES: [DType; 3] = [DType::F16, DType::BF16, DType::F32];

/// Values as a network makes them, blobs around 20, and clusters so tight and far out that most rows are near-ties.
fn kinds(shape: &[usize], dtype: DType, rng: &mut ChaCha8Rng) -> Vec<(&'static str, Tensor)> {
    vec![
        ("uniform", uniform(shape, 0.0, 1.0, dtype, rng)),
        ("offset", uniform(shape, 20.0, 1.0, dtype, rng)),
        ("tight", uniform(shape, 100.0, 0.3, dtype, rng)),
        ("whole", integers(shape, 2, dtype, rng)),
    ]
}

#[test]
fn every_width() {
    let mut rng = rng(31);
    let widths = [
        1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 80, 81, 96, 100, 112, 127, 128, 129, 144, 160,
        161, 192, 200, 224, 255, 256, 257, 300, 320, 384, 400, 448, 511, 512, 513, 640,
    ];
    for (i, d) in widths.into_iter().enumerate().flat_map(|(i, d)| [(i, d), (i + 1, d)]) {
        let dtype = TYPES[i % 3];
        for (j, (kind, x)) in kinds(&[200, d], dtype, &mut rng).into_iter().enumerate() {
            let metric = METRICS[(i + j) % 3];
            let c = kinds(&[129, d], dtype, &mut rng).swap_remove(j).1;
            check(&x, &c, metric, kind);
        }
    }
}

#[test]
fn every_height() {
    let mut rng = rng(32);
    for (i, n) in [1, 2, 63, 64, 65, 127, 128, 129, 191, 192, 193, 383, 385, 1000].into_iter().enumerate() {
        for k in [1, 2, 3, 63, 64, 65, 127, 128, 129, 255, 257, 1000] {
            let dtype = TYPES[(i + k) % 3];
            let (x, c) = (uniform(&[n, 24], 3.0, 1.0, dtype, &mut rng), uniform(&[k, 24], 3.0, 1.0, dtype, &mut rng));
            check(&x, &c, METRICS[(i + k) % 3], "heights");
        }
    }
}

#[test]
fn batches_and_layouts() {
    let mut rng = rng(33);
    for (b, n, k, d) in [(3, 100, 40, 64), (150, 30, 20, 40), (2, 500, 130, 136), (5, 1, 1, 16), (700, 3, 5, 8)] {
        for dtype in TYPES {
            let x = uniform(&[b, n, d], 20.0, 1.0, dtype, &mut rng);
            let own = uniform(&[b, k, d], 20.0, 1.0, dtype, &mut rng);
            let metric = METRICS[rng.random_range(0..3)];
            check(&x, &own, metric, "own centroids");
            check(&x, &own.narrow(0, 0, 1).unwrap().squeeze(0).unwrap(), metric, "shared centroids");
        }
    }
    // (batch, position, head, column): what a model's keys are before they are made contiguous.
    for d in [64, 60] {
        let x = uniform(&[2, 90, 3, d], 0.0, 1.0, DType::F16, &mut rng);
        let c = uniform(&[2, 3, 33, d], 0.0, 1.0, DType::F16, &mut rng);
        check(&x.transpose(1, 2).unwrap(), &c, Metric::Cosine, "heads in the middle");
        for laid in layouts(&x.narrow(2, 0, 1).unwrap().squeeze(2).unwrap().contiguous().unwrap()) {
            let c = c.narrow(1, 0, 1).unwrap().squeeze(1).unwrap();
            check(&laid.view, &c, Metric::SquaredEuclidean, &laid.name);
        }
    }
}

/// Problems of a batch that score different numbers of centroids, since some repeat each other, for rows that are near hundreds of
/// them: in two groups so far apart and so tight that what is rounded says little.
#[test]
fn crowded_problems_of_different_sizes() {
    let mut rng = rng(39);
    let (b, n, k, d) = (18, 300, 900, 32);
    let groups = |shape: &[usize], rng: &mut ChaCha8Rng| {
        let values = f64s(&uniform(shape, 0.0, 0.25, DType::F32, rng));
        tensor(shape, DType::F32, |i| values[i] + if i / d % 2 == 0 { 100.0 } else { -100.0 })
    };
    let (x, all) = (groups(&[b, n, d], &mut rng), groups(&[1, k, d], &mut rng));
    let some = all.narrow(1, 0, k / 6).unwrap().repeat((1, 6, 1)).unwrap();
    let turns: Vec<_> = (0..b).map(|i| if i % 2 == 0 { &some } else { &all }).collect();
    check(&x, &Tensor::cat(&turns, 0).unwrap(), Metric::SquaredEuclidean, "crowded");
}

/// Codebooks that stay on chip while a block goes through several problems, and last tiles of every width.
#[test]
fn small_codebooks() {
    let mut rng = rng(37);
    for (i, k) in [1, 31, 32, 33, 64, 65, 96, 97, 128, 130, 225, 300, 400, 512, 640, 700].into_iter().enumerate() {
        let d = [40, 64, 72, 128][i % 4];
        let (b, n) = if d == 128 { (140, 70) } else { (150, 210) };
        let (dtype, metric) = (TYPES[i % 3], METRICS[i % 3]);
        let x = uniform(&[b, n, d], 3.0, 1.0, dtype, &mut rng);
        check(&x, &uniform(&[b, k, d], 3.0, 1.0, dtype, &mut rng), metric, "small codebooks");
    }
}

/// Rows of at most eight columns, whose centroids are scored in rounds of places (`narrow_tensor.cuh`): every number of them, of
/// any size, crowded, repeated, and with rows and centroids that are far from all others.
#[test]
fn narrow_rows() {
    let mut rng = rng(40);
    for (i, k) in [1, 2, 7, 8, 9, 33, 63, 64, 65, 128, 129, 192, 256, 257, 300, 513, 700].into_iter().enumerate() {
        for d in [1 + i % 8, 1 + (i + 3) % 8, 1 + (i + 6) % 8] {
            let dtype = TYPES[(i + d) % 3];
            let (least, most) = if dtype == DType::F16 { (1e-3, 30.0) } else { (1e-16, 1e12) };
            for (j, (kind, x)) in kinds(&[260, d], dtype, &mut rng).into_iter().enumerate() {
                let c = kinds(&[k, d], dtype, &mut rng).swap_remove(j).1;
                check(&x, &c, Metric::SquaredEuclidean, kind);
                for by in [least, most] {
                    let [x, c] =
                        [&x, &c].map(|t| (t.to_dtype(DType::F64).unwrap() * by).unwrap().to_dtype(dtype).unwrap());
                    check(&x, &c, Metric::SquaredEuclidean, kind);
                }
                let by = if dtype == DType::F16 { 300.0 } else { 1e7 };
                check(&with_row(&x, 5, |_, v| v * by), &c, Metric::SquaredEuclidean, "a row far away");
                check(&x, &with_row(&c, k / 2, |_, v| v * by), Metric::SquaredEuclidean, "a centroid far away");
            }
            let [x, c] = [260, k].map(|n| tensor(&[n, d], dtype, |i| (i % d) as f64 - 1.0));
            check(&x, &c, Metric::SquaredEuclidean, "equal");
            let [x, c] = [260, k].map(|n| tensor(&[n, d], dtype, |_| 0.0));
            check(&x, &c, Metric::SquaredEuclidean, "zeros");
            let x = uniform(&[3, 1500, d], 5.0, 1.0, dtype, &mut rng);
            check(&x, &x.narrow(1, 0, k.min(1500)).unwrap(), Metric::SquaredEuclidean, "several tiles");
        }
    }
}

/// More problems than a grid has rows, and more centroids than anyone should need.
#[test]
fn many_problems_and_many_centroids() {
    let mut rng = rng(38);
    for dtype in TYPES {
        let x = uniform(&[65_537, 3, 8], 0.0, 1.0, dtype, &mut rng);
        check(&x, &uniform(&[65_537, 2, 8], 0.0, 1.0, dtype, &mut rng), Metric::SquaredEuclidean, "many problems");
        let x = uniform(&[40, 8], 0.0, 1.0, dtype, &mut rng);
        check(&x, &uniform(&[1_000_000, 8], 0.0, 1.0, dtype, &mut rng), Metric::SquaredEuclidean, "many centroids");
    }
}

/// Measures what the proof assumes of the tensor cores (kernels/assign/tensor.cuh): how far one product step is from the exact
/// sum, in units of the last place of what bounds it.
#[cfg(feature = "cuda")]
#[test]
fn tensor_cores_lose_no_more_than_assumed() {
    let mut rng = rng(39);
    let n = 200_000;
    for device in devices().into_iter().filter(|d| d.is_cuda()) {
        let later = testing::capability(&device).unwrap() >= 90;
        for (kernel, assumed) in [("assign_sm90", 6.0), ("assign_sm80", if later { 6.0 } else { 12.0 })] {
            for dtype in [DType::F16, DType::BF16] {
                // Values of one size, of many sizes, and products far below a large start: all that cancels, or is lost.
                let mut draw = |width: usize, spread: i32| {
                    tensor(&[n, width], dtype, |i| {
                        let size = if (i / width).is_multiple_of(3) { 0 } else { rng.random_range(-spread..=spread) };
                        rng.random_range(-2.0..2.0) * 2f64.powi(size)
                    })
                };
                let (a, b, start) = (draw(16, 7), draw(16, 7), draw(1, 12).to_dtype(DType::F32).unwrap());
                let on = |t: &Tensor| t.to_device(&device).unwrap();
                if !testing::candidates(&on(&a), 1, Metric::Dot).unwrap().contains(&kernel) {
                    continue;
                }
                let got = testing::product_step(kernel, &on(&start.flatten_all().unwrap()), &on(&a), &on(&b)).unwrap();
                let (got, start) = (f64s(&got), f64s(&start));
                let (a, b) = (f64s(&a), f64s(&b));
                let norm = |v: &[f64]| v.iter().map(|v| v * v).sum::<f64>().sqrt();
                let worst = (0..n).map(|i| {
                    let (a, b) = (&a[16 * i..16 * i + 16], &b[16 * i..16 * i + 16]);
                    let exact = start[i] + a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
                    (got[i] - exact).abs() / ((norm(a) * norm(b) + start[i].abs()) * 2f64.powi(-23))
                });
                let worst = largest(worst);
                println!("{kernel} {dtype:?}: {worst:.2} units of the last place");
                assert!(worst > 0.1 && worst <= assumed, "{kernel} {dtype:?}: {worst}");
            }
        }
    }
}

/// `x` with the row `at` (of two dimensions) as `f` makes it of its values.
fn with_row(x: &Tensor, at: usize, f: impl Fn(usize, f64) -> f64) -> Tensor {
    let (n, d) = x.dims2().unwrap();
    let values = f64s(x);
    let value = |i: usize| if i / d == at { f(i % d, values[i]) } else { values[i] };
    tensor(&[n, d], x.dtype(), value)
}

/// Centroids that no row is near, or that say nothing: what the bound leaves out must not be missed by the rows that
/// are near it after all.
#[test]
fn outliers_among_centroids() {
    let mut rng = rng(41);
    for (i, (n, k, d)) in [(300, 150, 64), (130, 600, 128), (200, 40, 20), (260, 129, 300)].into_iter().enumerate() {
        for dtype in TYPES {
            for offset in [0.0, 20.0] {
                let x = uniform(&[n, d], offset, 1.0, dtype, &mut rng);
                let c = uniform(&[k, d], offset, 1.0, dtype, &mut rng);
                for (j, factor) in [0.0, -1.0, 3.0, 8.0, 20.0, 100.0, 300.0, 1e4, 1e10, 1e30].into_iter().enumerate() {
                    if factor * (offset + 1.0) > if dtype == DType::F16 { 6e4 } else { 1e38 } {
                        continue;
                    }
                    let far = with_row(&c, k / 2, |_, v| v * factor);
                    // Rows beside the outlier, half way to it, and far from everything.
                    let near = with_row(&x, 7, |_, v| v * factor);
                    let near = with_row(&with_row(&near, 8, |_, v| v * factor / 2.0), 9, |_, v| v * factor / 8.0);
                    let metric = METRICS[if (i + j) % 4 == 3 { 1 + j % 3 } else { 0 }];
                    check(&x, &far, metric, &format!("a centroid times {factor}"));
                    check(&near, &far, metric, &format!("rows and a centroid times {factor}"));
                    check(&near, &c, metric, &format!("rows times {factor}"));
                }
            }
        }
    }
}

/// Most centroids out of reach of most rows, and the other way round; rows that are nearly all zero.
#[test]
fn most_are_outliers() {
    let mut rng = rng(42);
    for dtype in TYPES {
        let scaled = |t: &Tensor, some: usize, by: f64| {
            let (values, d) = (f64s(t), t.dim(1).unwrap());
            tensor(t.dims(), dtype, |i| if (i / d) % 16 < some { values[i] * by } else { values[i] })
        };
        let (x, c) = (uniform(&[400, 64], 0.5, 1.0, dtype, &mut rng), uniform(&[260, 64], 0.5, 1.0, dtype, &mut rng));
        for some in [1, 3, 8, 15, 16] {
            for by in [0.0, 1e-3, 50.0, 3e3] {
                check(&x, &scaled(&c, some, by), Metric::SquaredEuclidean, "most centroids");
                check(&scaled(&x, some, by), &c, Metric::SquaredEuclidean, "most rows");
                check(&scaled(&x, some, by), &scaled(&c, some, by), Metric::SquaredEuclidean, "both");
            }
        }
    }
}

/// NaN and infinities in centroids and rows: at distance +inf, which is nearer than nothing.
#[test]
fn nothing_finite() {
    let mut rng = rng(43);
    for (n, k, d) in [(200, 300, 64), (140, 33, 24), (300, 150, 5)] {
        for dtype in DTYPES {
            let (x, c) = (uniform(&[n, d], 0.5, 1.0, dtype, &mut rng), uniform(&[k, d], 0.5, 1.0, dtype, &mut rng));
            for metric in METRICS {
                for v in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
                    let what = |which: &str| format!("{which} of {v}");
                    let one = with_row(&c, 0, |q, old| if q == d / 2 { v } else { old });
                    let two = with_row(&one, k - 1, |_, _| v);
                    let row = with_row(&x, 3, |q, old| if q == d - 1 { v } else { old });
                    check(&x, &one, metric, &what("an element"));
                    check(&x, &two, metric, &what("centroids"));
                    check(&row, &c, metric, &what("an element of a row"));
                    check(&row, &two, metric, &what("rows and centroids"));
                    check(&with_row(&row, 5, |_, _| 0.0), &two, metric, &what("a zero row and centroids"));
                    let none = Tensor::full(v, (k, d), c.device()).unwrap().to_dtype(dtype).unwrap();
                    check(&row, &none, metric, &what("all centroids"));
                    check(&none.narrow(0, 0, 20).unwrap(), &c, metric, &what("all rows"));
                }
            }
        }
    }
}

#[test]
fn ties_and_duplicates() {
    let mut rng = rng(34);
    for (n, k, d) in [(300, 400usize, 64), (200, 1024, 128), (100, 130, 256), (150, 300, 20), (70, 200, 512)] {
        for dtype in TYPES {
            let few = integers(&[k.div_ceil(3), d], 1, dtype, &mut rng);
            let c = Tensor::cat(&[&few, &few, &few], 0).unwrap().narrow(0, 0, k).unwrap();
            for metric in [Metric::SquaredEuclidean, Metric::Dot, Metric::Cosine] {
                check(&integers(&[n, d], 1, dtype, &mut rng), &c, metric, "duplicates");
                check(&integers(&[n, d], 1, dtype, &mut rng).zeros_like().unwrap(), &c, metric, "zeros");
            }
        }
    }
}

/// Ends of the range of each type, where squares overflow f32 or vanish, and rows of no finite distance.
#[test]
fn extremes() {
    let mut rng = rng(35);
    for (dtype, scales) in [
        (DType::F16, vec![6e4, 1.0, 1e-4, 6e-8]),
        (DType::BF16, vec![1e38, 1e19, 1e-19, 1e-38]),
        (DType::F32, vec![1e38, 1e19, 1e-19, 1e-38]),
    ] {
        for scale in scales {
            for metric in [Metric::SquaredEuclidean, Metric::Dot, Metric::Cosine] {
                let x = uniform(&[100, 40], 0.0, scale, dtype, &mut rng);
                check(&x, &uniform(&[150, 40], 0.0, scale, dtype, &mut rng), metric, "scale");
            }
        }
        let mut x = vec![0.5; 65 * 24];
        (x[24 * 3], x[24 * 10 + 5], x[24 * 64 + 23]) = (f64::NAN, f64::INFINITY, f64::NEG_INFINITY);
        let x = tensor(&[65, 24], dtype, |i| x[i]);
        let c = uniform(&[200, 24], 0.0, 1.0, dtype, &mut rng);
        check(&x, &c, Metric::SquaredEuclidean, "not finite");
    }
}
