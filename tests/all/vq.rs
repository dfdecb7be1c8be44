//! Vector quantisers that train, each against what its paper says, in f64 by loops.

use crate::common::*;
use candle_core::{DType, Device, Module, Tensor, Var};
use candle_flash_kmeans::{
    nn::{
        rotate_to, Codebook, Ema, EmaCodebook, EmaResidualQuantizer, Fsq, LearnableCodebook, Lfq, LfqConfig,
        ResidualQuantizer,
    },
    Error, KMeans, Metric,
};

const FLOATS: [DType; 4] = [DType::F16, DType::BF16, DType::F32, DType::F64];

fn gradient(loss: &Tensor, x: &Var) -> Tensor {
    loss.backward().unwrap().get(x).unwrap().clone()
}

/// The gradient of the sum of `values`, each times a number.
fn pulled(values: &Tensor, by: &Tensor, x: &Var) -> Tensor {
    gradient(&(values * by).unwrap().sum_all().unwrap(), x)
}

fn var(t: &Tensor, device: &Device) -> Var {
    Var::from_tensor(&t.to_device(device).unwrap()).unwrap()
}

/// What is rounded, of a value and its levels.
fn spec_bounded(z: f64, l: usize) -> f64 {
    let half = (l - 1) as f64 * 1.001 / 2.0;
    let offset = if l.is_multiple_of(2) { 0.5 } else { 0.0 };
    half * (z + (offset / half).atanh()).tanh() - offset
}

#[test]
fn finite_scalars_are_rounded_levels() {
    for device in devices() {
        for levels in [vec![8, 5, 5, 5], vec![2, 3], vec![7, 6, 4]] {
            let (fsq, d) = (Fsq::new(&levels).unwrap(), levels.len());
            assert_eq!((fsq.d(), fsq.codebook_size()), (d, levels.iter().product()));
            for dtype in FLOATS {
                let x = uniform(&[3, 50, d], 0.0, 3.0, dtype, &mut rng(7));
                let rows = problems(&x).concat();
                let mut codes = vec![];
                let (mut values, mut slopes) = (vec![], vec![]);
                for row in &rows {
                    let (mut code, mut base) = (0, 1);
                    for (&z, &l) in row.iter().zip(&levels) {
                        let digit = spec_bounded(z, l).round() + (l / 2) as f64;
                        assert!(digit >= 0.0 && digit < l as f64);
                        values.push((digit - (l / 2) as f64) / (l / 2) as f64);
                        let step = 1e-5;
                        let slope = (spec_bounded(z + step, l) - spec_bounded(z - step, l)) / (2.0 * step);
                        slopes.push(slope / (l / 2) as f64);
                        code += digit as u32 * base;
                        base *= l as u32;
                    }
                    codes.push(code);
                }
                let x = var(&x, &device);
                let got = fsq.encode(&x).unwrap();
                assert_eq!((got.dims(), u32s(&got)), (&[3, 50][..], codes), "{levels:?} {dtype:?}");
                let out = fsq.forward(&x).unwrap();
                assert_eq!((out.dims(), out.dtype()), (x.dims(), dtype));
                assert_near(&out, &values, ulp(1.0, dtype).max(1e-7), "values");
                let decoded = fsq.decode(&got).unwrap();
                let stored = if dtype == DType::F64 { DType::F32 } else { dtype };
                let rounded = out.detach().to_dtype(stored).unwrap();
                assert_same(&decoded.to_dtype(stored).unwrap(), &rounded, "decoded");
                let grad = pulled(&out, &out.ones_like().unwrap(), &x);
                assert_near(&grad, &slopes, 4.0 * ulp(2.0, dtype).max(1e-6), "slopes");
            }
            // Every code names values of its own.
            let all = Tensor::arange(0u32, fsq.codebook_size() as u32, &device).unwrap();
            let mut seen: Vec<Vec<u64>> = problems(&fsq.decode(&all).unwrap())[0]
                .iter()
                .map(|row| row.iter().map(|v| v.to_bits()).collect())
                .collect();
            seen.sort_unstable();
            seen.dedup();
            assert_eq!(seen.len(), fsq.codebook_size());
            let beyond = Tensor::new(&[fsq.codebook_size() as u32], &device).unwrap();
            assert!(f64s(&fsq.decode(&beyond).unwrap()).iter().all(|v| v.is_nan()));
        }
    }
}

/// The loss of a lookup-free quantiser, by a softmax over all codes.
fn spec_loss(rows: &Rows, config: &LfqConfig) -> f64 {
    let (d, n) = (rows[0].len(), rows.len() as f64);
    let code =
        |j: usize, c: usize| if j >> (d - 1 - c) & 1 == 1 { config.codebook_scale } else { -config.codebook_scale };
    let entropy = |p: &[f64]| -sum(p.iter().filter(|p| **p > 0.0).map(|p| p * p.ln()));
    let (mut mean, mut each) = (vec![0.0; 1 << d], 0.0);
    for row in rows {
        let distance = |j: usize| sum((0..d).map(|c| (row[c] - code(j, c)).powi(2)));
        let least = (0..1 << d).map(distance).fold(f64::INFINITY, f64::min);
        let p: Vec<_> = (0..1 << d).map(|j| (-config.inv_temperature * (distance(j) - least)).exp()).collect();
        let total = sum(p.iter().copied());
        let p: Vec<_> = p.iter().map(|p| p / total).collect();
        each += entropy(&p) / n;
        mean.iter_mut().zip(&p).for_each(|(mean, p)| *mean += p / n);
    }
    let sign = |v: f64| if v > 0.0 { config.codebook_scale } else { -config.codebook_scale };
    let off = sum(rows.iter().flatten().map(|&v| (v - sign(v)).powi(2))) / (n * d as f64);
    config.entropy_loss_weight * (each - config.diversity_gamma * entropy(&mean)) + config.commitment_loss_weight * off
}

#[test]
fn lookup_free_codes_are_signs() {
    for device in devices() {
        for dtype in FLOATS {
            let x = uniform(&[2, 30, 5], 0.0, 1.0, dtype, &mut rng(8));
            let config = LfqConfig { codebook_scale: 0.5, ..LfqConfig::default() };
            let lfq = Lfq::new(5, config).unwrap();
            let rows = problems(&x).concat();
            let codes: Vec<_> =
                rows.iter().map(|row| row.iter().fold(0, |code, &v| 2 * code + u32::from(v > 0.0))).collect();
            let values: Vec<_> = rows.iter().flatten().map(|&v| if v > 0.0 { 0.5 } else { -0.5 }).collect();
            let x = var(&x, &device);
            let out = lfq.quantize(&x).unwrap();
            assert_eq!((out.codes.dims(), u32s(&out.codes)), (&[2, 30][..], codes.clone()));
            assert_eq!((out.values.dtype(), f64s(&out.values)), (dtype, values.clone()));
            assert_eq!(f64s(&lfq.decode(&out.codes).unwrap()), values);
            let used = (0..32).filter(|code| codes.contains(code)).count();
            assert_eq!(u32s(&out.usage.codes_used), [used as u32]);
            let by = uniform(x.dims(), 0.0, 1.0, dtype, &mut rng(9)).to_device(&device).unwrap();
            assert_same(&pulled(&out.values, &by, &x), &by, "straight through");
        }
    }
}

#[test]
fn lookup_free_losses_are_those_of_all_codes() {
    for device in devices() {
        for (seed, inv_temperature) in [(1, 0.5), (2, 3.0), (3, 100.0)] {
            let config = LfqConfig {
                inv_temperature,
                commitment_loss_weight: 0.25,
                diversity_gamma: 1.5,
                codebook_scale: 0.7,
                ..LfqConfig::default()
            };
            let lfq = Lfq::new(4, config).unwrap();
            let x = uniform(&[1, 6, 4], 0.0, 1.0, DType::F64, &mut rng(seed));
            let rows = problems(&x)[0].clone();
            let x = var(&x, &device);
            let loss = lfq.loss(&x).unwrap();
            assert_near(&loss, &[spec_loss(&rows, &config)], 1e-9, "f64");
            let slopes: Vec<_> = (0..24)
                .map(|i| {
                    let moved = |by: f64| {
                        let mut rows = rows.clone();
                        rows[i / 4][i % 4] += by;
                        spec_loss(&rows, &config)
                    };
                    (moved(1e-6) - moved(-1e-6)) / 2e-6
                })
                .collect();
            assert_near(&gradient(&loss, &x), &slopes, 1e-6, "gradient");
            let half = x.to_dtype(DType::F32).unwrap();
            let loss = lfq.loss(&half).unwrap();
            assert_eq!(loss.dtype(), DType::F32);
            assert_near(&loss, &[spec_loss(&problems(&half)[0], &config)], 1e-5, "f32");
        }
    }
}

#[test]
fn a_rotation_takes_gradients_along() {
    for device in devices() {
        let d = 6;
        let x = uniform(&[40, d], 0.3, 1.0, DType::F64, &mut rng(10));
        let q = uniform(&[40, d], 0.0, 1.0, DType::F64, &mut rng(11));
        let g = uniform(&[40, d], 0.0, 1.0, DType::F64, &mut rng(12));
        let (rows, values, pulls) = (&problems(&x)[0], &problems(&q)[0], &problems(&g)[0]);
        let unit = |v: &[f64]| v.iter().map(|t| t / dot(v, v).sqrt()).collect::<Vec<_>>();
        let mut expected = vec![];
        for ((x, q), g) in rows.iter().zip(values).zip(pulls) {
            let (u, v) = (unit(x), unit(q));
            let w = unit(&u.iter().zip(&v).map(|(a, b)| a + b).collect::<Vec<_>>());
            let turn = |i: usize, j: usize| f64::from(i == j) - 2.0 * w[i] * w[j] + 2.0 * v[i] * u[j];
            // It is a rotation, and takes one direction to the other.
            for (i, v) in v.iter().enumerate() {
                assert!((sum((0..d).map(|j| turn(i, j) * u[j])) - v).abs() < 1e-12);
                for j in 0..d {
                    let product = sum((0..d).map(|c| turn(i, c) * turn(j, c)));
                    assert!((product - f64::from(i == j)).abs() < 1e-12);
                }
            }
            let factor = (dot(q, q) / dot(x, x)).sqrt();
            let grad: Vec<_> = (0..d).map(|j| factor * sum((0..d).map(|i| turn(i, j) * g[i]))).collect();
            let cosine = |a: &[f64], b: &[f64]| dot(&unit(a), &unit(b));
            assert!((cosine(&grad, x) - cosine(g, q)).abs() < 1e-12);
            expected.extend(grad);
        }
        let (x, q, g) = (var(&x, &device), q.to_device(&device).unwrap(), g.to_device(&device).unwrap());
        let out = rotate_to(&x, &q).unwrap();
        assert_same(&out.detach(), &q, "values are not rounded");
        assert_near(&pulled(&out, &g, &x), &expected, 1e-12, "gradient");
        // Rows and values of length 0 have no direction.
        for zeros in [true, false] {
            let (x, q) = if zeros {
                (x.zeros_like().unwrap(), q.clone())
            } else {
                (x.as_tensor().clone(), q.zeros_like().unwrap())
            };
            let x = var(&x, &device);
            assert_same(&pulled(&rotate_to(&x, &q).unwrap(), &g, &x), &g, "unchanged");
        }
        let error = rotate_to(&x, &q.narrow(1, 0, 2).unwrap()).unwrap_err();
        assert_eq!(error.to_string(), "values: shape [40, 2], expected [40, 6]");

        // An option of the codebooks.
        let codebook = Codebook::new(&q.narrow(0, 0, 5).unwrap(), Metric::SquaredEuclidean).unwrap();
        let ema = EmaCodebook::new(codebook.clone(), Ema { rotation_trick: true, ..Ema::default() }).unwrap();
        let entries = codebook.decode(&codebook.encode(&x).unwrap()).unwrap();
        let expected = pulled(&rotate_to(&x, &entries).unwrap(), &g, &x);
        assert_same(&pulled(&ema.quantize(&x).unwrap().values, &g, &x), &expected, "moving averages");
        let learnable = LearnableCodebook::new(codebook.centroids(), Metric::SquaredEuclidean).unwrap();
        let learnable = learnable.rotation_trick(true);
        assert_same(&pulled(&learnable.quantize(&x).unwrap().values, &g, &x), &expected, "learnable");
    }
}

#[test]
fn a_frozen_codebook_sees_what_a_step_sees() {
    let folder = Folder::new("vq");
    for device in devices() {
        let x = uniform(&[2, 50, 4], 0.0, 1.0, DType::F32, &mut rng(13)).to_device(&device).unwrap();
        let mask = tensor(&[2, 50], DType::F32, |i| f64::from(i % 3 != 0)).to_device(&device).unwrap();
        let settings = Ema { threshold_ema_dead_code: 2.0, rotation_trick: true, ..Ema::default() };
        // No optimum, so that every step moves the entries.
        let mut ema = EmaCodebook::train(&x, &KMeans::new(6).max_iters(1), settings).unwrap();
        for _ in 0..3 {
            let before = ema.codebook().centroids().copy().unwrap();
            let (frozen, masked) = (ema.quantize(&x).unwrap(), ema.quantize_weighted(&x, &mask).unwrap());
            assert_same(ema.codebook().centroids(), &before, "frozen");
            let mut other = ema.clone();
            for (frozen, learned) in
                [(masked, other.step_weighted(&x, &mask).unwrap()), (frozen, ema.step(&x).unwrap())]
            {
                assert_same(&frozen.values, &learned.values, "values");
                assert_same(&frozen.codes, &learned.codes, "codes");
                assert_same(&frozen.loss, &learned.loss, "loss");
                assert_same(&frozen.usage.perplexity, &learned.usage.perplexity, "perplexity");
            }
            assert_ne!(f64s(ema.codebook().centroids()), f64s(&before));
        }
        let path = folder.0.join("ema.safetensors");
        ema.save(&path).unwrap();
        assert_eq!(EmaCodebook::load(&path, &device).unwrap().ema(), settings);
    }
}

#[test]
fn rows_of_half_types_may_have_entries_in_f32() {
    for device in devices() {
        for dtype in [DType::F16, DType::BF16] {
            let x = var(&uniform(&[60, 4], 0.0, 1.0, dtype, &mut rng(14)), &device);
            let wide = x.detach().to_dtype(DType::F32).unwrap();
            let start = Codebook::train(&wide, &KMeans::new(5)).unwrap();
            let mut of_halves = EmaCodebook::new(start.clone(), Ema::default()).unwrap();
            let mut of_floats = of_halves.clone();
            for _ in 0..3 {
                let (half, float) = (of_halves.step(&x).unwrap(), of_floats.step(&wide).unwrap());
                assert_eq!((half.values.dtype(), half.loss.dtype()), (dtype, DType::F32));
                assert_same(&half.values.detach(), &float.values.to_dtype(dtype).unwrap(), "values");
                assert_same(&half.codes, &float.codes, "codes");
                assert_same(&half.loss.detach(), &float.loss, "loss");
                assert_same(of_halves.codebook().centroids(), of_floats.codebook().centroids(), "entries");
                assert_eq!(gradient(&half.loss, &x).dtype(), dtype);
            }
            let learnable = LearnableCodebook::new(start.centroids(), Metric::SquaredEuclidean).unwrap();
            let (half, float) = (learnable.quantize(&x).unwrap(), learnable.quantize(&wide).unwrap());
            assert_same(&half.values.detach(), &float.values.to_dtype(dtype).unwrap(), "learnable values");
            assert_same(&half.loss.detach(), &float.loss, "learnable loss");
        }
    }
}

#[test]
fn entries_that_are_parameters_get_gradients() {
    for device in devices() {
        for (batch, own) in [(1, false), (3, false), (3, true)] {
            let (n, k, d, beta) = (20, 4, 3, 0.25);
            let mut x = uniform(&[batch, n, d], 0.0, 1.0, DType::F64, &mut rng(15));
            let entries = uniform(&[if own { batch } else { 1 }, k, d], 0.0, 1.0, DType::F64, &mut rng(16));
            let entries = if own { entries } else { entries.squeeze(0).unwrap() };
            // The first row says nothing, and each third is masked.
            let nan = tensor(&[batch, n, d], DType::F64, |i| if i % (n * d) < d { f64::NAN } else { 0.0 });
            x = (x + nan).unwrap();
            let weight = |i: usize| if i % 3 == 1 { 0.0 } else { 1.0 + (i % 2) as f64 };
            let mask = tensor(&[batch, n], DType::F64, |i| weight(i % n));
            let labels = spec_labels(&x, &entries, Metric::SquaredEuclidean);
            let (rows, all) = (problems(&x), problems(&entries));
            let counted = |b: usize, i: usize| if rows[b][i][0].is_nan() { 0.0 } else { weight(i) };
            let total = sum((0..batch * n).map(|i| counted(i / n, i % n)));
            let (mut loss, mut of_rows) = (0.0, vec![]);
            let mut of_entries = vec![vec![vec![0.0; d]; k]; all.len()];
            for (b, i) in (0..batch).flat_map(|b| (0..n).map(move |i| (b, i))) {
                let (e, j) = (if own { b } else { 0 }, labels[b * n + i] as usize);
                for c in 0..d {
                    let share = counted(b, i) / (total * d as f64);
                    let off = if share > 0.0 { rows[b][i][c] - all[e][j][c] } else { 0.0 };
                    loss += (1.0 + beta) * share * off * off;
                    of_rows.push(2.0 * beta * share * off);
                    of_entries[e][j][c] -= 2.0 * share * off;
                }
            }
            let (x, entries) = (var(&x, &device), var(&entries, &device));
            let learnable =
                LearnableCodebook::new(&entries, Metric::SquaredEuclidean).unwrap().commitment_weight(beta).unwrap();
            let out = learnable.quantize_weighted(&x, &mask.to_device(&device).unwrap()).unwrap();
            assert_eq!(u32s(&out.codes), labels);
            assert_near(&out.loss, &[loss], 1e-12, "loss");
            let grads = out.loss.backward().unwrap();
            assert_near(grads.get(&x).unwrap(), &of_rows, 1e-12, "rows");
            assert_near(grads.get(&entries).unwrap(), &of_entries.concat().concat(), 1e-12, "entries");
            // What an optimiser makes of the variable is what the next call sees.
            let moved = (entries.as_tensor() - (grads.get(&entries).unwrap() * 0.5).unwrap()).unwrap();
            entries.set(&moved.detach()).unwrap();
            assert_same(learnable.codebook().unwrap().centroids(), &moved.detach(), "moved");
            let after = learnable.quantize_weighted(&x, &mask.to_device(&device).unwrap()).unwrap();
            assert!(f64s(&after.loss)[0] < f64s(&out.loss)[0]);
        }
    }
    let entries = ones(&[3, 2], DType::F32, &Device::Cpu);
    let error = LearnableCodebook::new(&entries, Metric::Cosine).unwrap_err();
    assert!(matches!(error, Error::Conflict { argument: "metric", .. }), "{error}");
    for weight in [-1.0, f64::NAN, f64::INFINITY] {
        let learnable = LearnableCodebook::new(&entries, Metric::SquaredEuclidean).unwrap();
        let error = learnable.commitment_weight(weight).unwrap_err();
        assert!(matches!(error, Error::Value { argument: "commitment_weight", .. }), "{error}");
    }
}

#[test]
fn stages_learn_what_is_left_over() {
    for device in devices() {
        let x = var(&uniform(&[2, 40, 4], 0.0, 1.0, DType::F64, &mut rng(17)), &device);
        let mask = tensor(&[2, 40], DType::F64, |i| f64::from(i % 5 != 0)).to_device(&device).unwrap();
        let ema = Ema { decay: 0.5, ..Ema::default() };
        let mut quantizer = EmaResidualQuantizer::train(&x, 3, &KMeans::new(4), ema).unwrap();
        for masked in [false, true] {
            let mut stages = quantizer.codebooks().to_vec();
            let before = quantizer.quantizer().unwrap();
            let frozen = if masked { quantizer.quantize_weighted(&x, &mask) } else { quantizer.quantize(&x) }.unwrap();
            let out = if masked { quantizer.step_weighted(&x, &mask) } else { quantizer.step(&x) }.unwrap();
            assert_same(&out.codes, &before.encode(&x).unwrap(), "codes");
            assert_near(&out.values, &f64s(&before.decode(&out.codes).unwrap()), 1e-12, "values");
            assert_same(&frozen.codes, &out.codes, "frozen");
            let (mut left, mut losses) = (x.detach(), vec![]);
            for (stage, learned) in stages.iter_mut().zip(quantizer.codebooks()) {
                let own = if masked { stage.step_weighted(&left, &mask) } else { stage.step(&left) }.unwrap();
                left = (left - own.values).unwrap();
                losses.push(f64s(&own.loss)[0]);
                assert_same(learned.codebook().centroids(), stage.codebook().centroids(), "stage");
            }
            assert_near(&out.loss, &[sum(losses.into_iter())], 1e-12, "loss");
            assert_same(&frozen.loss, &out.loss, "frozen loss");
            // Once, however many stages there are.
            let by = out.values.ones_like().unwrap();
            assert_same(&pulled(&out.values, &by, &x), &by.detach(), "straight through");
        }
        // A start has seen the rows of each cluster, and goes where its tensors go.
        let started = EmaResidualQuantizer::train(&x, 2, &KMeans::new(4), ema).unwrap();
        let first = EmaCodebook::train(&x.detach(), &KMeans::new(4), ema).unwrap();
        let sizes = |codebook: &EmaCodebook| codebook.cluster_size().unwrap();
        assert_same(&sizes(&started.codebooks()[0]), &sizes(&first), "rows of a first stage");
        assert_eq!(sum(f64s(&sizes(&started.codebooks()[1])).into_iter()), 80.0);
        let moved = started.to_device(&Device::Cpu).unwrap().to_dtype(DType::F32).unwrap();
        assert_eq!(moved.codebooks()[1].codebook().centroids().dtype(), DType::F32);
        assert_eq!(moved.stages(), 2);
        // Each stage pulls its rows to its entries: of a row `r` and values `q` it is `2 (r - q) / elements`, stage by stage.
        let out = quantizer.quantize(&x).unwrap();
        let now = quantizer.quantizer().unwrap();
        let mut expected = vec![0.0; 2 * 40 * 4];
        for s in 1..=3 {
            let part = now.first(s).unwrap();
            let values = f64s(&part.decode(&part.encode(&x).unwrap()).unwrap());
            expected.iter_mut().zip(f64s(&x)).zip(values).for_each(|((e, x), q)| *e += 2.0 * (x - q) / 320.0);
        }
        assert_near(&gradient(&out.loss, &x), &expected, 1e-12, "losses");
    }
}

#[test]
fn stages_may_share_a_codebook_and_drop_out() {
    for device in devices() {
        let x = uniform(&[40, 4], 0.0, 1.0, DType::F64, &mut rng(18)).to_device(&device).unwrap();
        let start = EmaCodebook::train(&x, &KMeans::new(8), Ema::default()).unwrap();
        let mut shared = EmaResidualQuantizer::shared(start.clone(), 3).unwrap();
        let codebooks = vec![start.codebook().clone(); 3];
        let before = ResidualQuantizer::new(codebooks).unwrap();
        let mut lefts = vec![x.clone()];
        for s in 1..3 {
            let part = before.first(s).unwrap();
            lefts.push((&x - part.decode(&part.encode(&x).unwrap()).unwrap()).unwrap());
        }
        let mut one = start.clone();
        let of_all = one.step(&Tensor::cat(&lefts, 0).unwrap()).unwrap();
        let out = shared.step(&x).unwrap();
        assert_same(&out.codes, &before.encode(&x).unwrap(), "codes");
        assert_near(&out.values, &f64s(&before.decode(&out.codes).unwrap()), 1e-12, "values");
        assert_near(&out.loss, &[3.0 * f64s(&of_all.loss)[0]], 1e-12, "loss");
        assert_eq!((shared.codebooks().len(), shared.stages(), out.usage.len()), (1, 3, 1));
        assert_near(shared.codebooks()[0].codebook().centroids(), &f64s(one.codebook().centroids()), 1e-12, "entries");
        let stages = shared.quantizer().unwrap();
        assert!(stages.stages().iter().all(|s| f64s(s.centroids()) == f64s(stages.stages()[0].centroids())));

        for quantizer in [shared, EmaResidualQuantizer::train(&x, 3, &KMeans::new(8), Ema::default()).unwrap()] {
            let mut quantizer = quantizer.quantize_dropout(2, 5).unwrap();
            let mut again = quantizer.clone();
            let mut seen = vec![];
            for _ in 0..20 {
                let before = quantizer.quantizer().unwrap();
                let out = quantizer.step(&x).unwrap();
                let stages = out.codes.dims()[1];
                assert_same(&out.codes, &before.first(stages).unwrap().encode(&x).unwrap(), "the first stages");
                assert_same(&again.step(&x).unwrap().codes, &out.codes, "the same seed");
                seen.push(stages);
            }
            assert!(seen.contains(&2) && seen.contains(&3) && seen.iter().all(|s| (2..=3).contains(s)), "{seen:?}");
            // Outside of training there are all.
            assert_eq!(quantizer.quantize(&x).unwrap().codes.dims(), [40, 3]);
            let wrong = ones(&[39], DType::F64, &device);
            let error = quantizer.step_weighted(&x, &wrong).unwrap_err().to_string();
            assert_eq!(error, "sample_weights: shape [39], expected [40]");
            let error = quantizer.quantize_dropout(4, 0).unwrap_err();
            assert_eq!(error.to_string(), "stages: 4 is outside 1..=3");
        }
    }
}

#[test]
fn quantisers_without_entries_refuse_what_does_not_fit() {
    let x = ones(&[2, 3], DType::F32, &Device::Cpu);
    let message = |e: Error| e.to_string();
    assert_eq!(message(Fsq::new(&[]).unwrap_err()), "levels: 0 is outside 1..");
    assert_eq!(message(Fsq::new(&[3, 1]).unwrap_err()), "levels: 1 is outside 2..=4294967295");
    assert!(message(Fsq::new(&[1 << 20, 1 << 20]).unwrap_err()).contains("exceeds the limit of 4294967295"));
    assert_eq!(message(Fsq::new(&[3, 3]).unwrap().encode(&x).unwrap_err()), "x: columns is 3, expected 2");
    assert_eq!(message(Lfq::new(32, LfqConfig::default()).unwrap_err()), "d: 32 is outside 1..=31");
    let bad = LfqConfig { diversity_gamma: -1.0, ..LfqConfig::default() };
    assert_eq!(message(Lfq::new(3, bad).unwrap_err()), "diversity_gamma: -1 is not a finite number of at least 0");
    let lfq = Lfq::new(2, LfqConfig::default()).unwrap();
    assert_eq!(message(lfq.quantize(&x).unwrap_err()), "x: columns is 3, expected 2");
    let none = ones(&[0, 2], DType::F32, &Device::Cpu);
    assert_eq!(message(lfq.quantize(&none).unwrap_err()), "x rows: 0 is outside 1..");
    assert_eq!(message(lfq.loss(&none).unwrap_err()), "x rows: 0 is outside 1..");
    assert_eq!(lfq.encode(&none).unwrap().dims(), [0]);
    assert_eq!(Fsq::new(&[3, 3]).unwrap().forward(&none).unwrap().dims(), [0, 2]);
    assert_eq!(message(lfq.decode(&x).unwrap_err()), "codes: dtype F32, expected U8 or U32");
}

/// Of more than a thousand levels the range ends beyond the last one.
#[test]
fn finite_scalars_of_many_levels_stay_among_them() {
    for device in devices() {
        for levels in [1002, 2048, 5001] {
            let fsq = Fsq::new(&[levels, 3]).unwrap();
            let x = Tensor::new(&[[100f32, 0.0], [-100.0, 100.0], [0.3, -100.0], [3.9, 0.1]], &device).unwrap();
            let (codes, values) = (fsq.encode(&x).unwrap(), fsq.forward(&x).unwrap());
            assert_same(&fsq.decode(&codes).unwrap(), &values, &format!("{levels} levels"));
        }
    }
}

/// Stages learn from what the codes of a beam leave to them, each of its own entries or all of shared ones.
#[test]
fn stages_learn_by_a_beam() {
    for device in devices() {
        let x = var(&uniform(&[60, 4], 0.0, 1.0, DType::F64, &mut rng(19)), &device);
        let mask = tensor(&[60], DType::F64, |i| f64::from(i % 7 != 0)).to_device(&device).unwrap();
        let ema = Ema { decay: 0.5, eps: 0.0, ..Ema::default() };
        let separate = EmaResidualQuantizer::train(&x, 3, &KMeans::new(6), ema).unwrap();
        let one = EmaCodebook::train(&x.detach(), &KMeans::new(6), ema).unwrap();
        let shared = EmaResidualQuantizer::shared(one, 3).unwrap();
        let mut differing = 0;
        for (mut quantizer, is_shared) in [(separate.beam(4).unwrap(), false), (shared.beam(4).unwrap(), true)] {
            let before = quantizer.quantizer().unwrap();
            let sizes = |q: &EmaResidualQuantizer, s: usize| f64s(&q.codebooks()[s].cluster_size().unwrap());
            let old: Vec<_> = (0..quantizer.codebooks().len()).map(|s| sizes(&quantizer, s)).collect();
            let frozen = quantizer.quantize_weighted(&x, &mask).unwrap();
            let out = quantizer.step_weighted(&x, &mask).unwrap();
            let expected = before.encode_beam(&x, 4).unwrap();
            assert_same(&out.codes, &expected, "codes");
            assert_same(&frozen.codes, &expected, "frozen codes");
            assert_near(&out.values, &f64s(&before.decode(&expected).unwrap()), 1e-12, "values");
            let greedy = u32s(&before.encode(&x).unwrap());
            differing += u32s(&expected).iter().zip(&greedy).filter(|(a, b)| a != b).count();
            // What each stage gets, by loops.
            let entries: Vec<_> = before.stages().iter().map(|s| problems(s.centroids())[0].clone()).collect();
            let (mut counts, mut sums) = (vec![vec![0.0; 6]; 3], vec![vec![vec![0.0; 4]; 6]; 3]);
            for ((row, codes), w) in problems(&x)[0].iter().zip(u32s(&expected).chunks(3)).zip(f64s(&mask)) {
                let mut left = row.clone();
                for (s, &code) in codes.iter().enumerate() {
                    let (j, own) = (code as usize, if is_shared { 0 } else { s });
                    counts[own][j] += w;
                    left.iter().zip(&mut sums[own][j]).for_each(|(v, sum)| *sum += w * v);
                    left.iter_mut().zip(&entries[s][j]).for_each(|(v, e)| *v -= e);
                }
            }
            for (s, codebook) in quantizer.codebooks().iter().enumerate() {
                let (has, is) = (sizes(&quantizer, s), problems(codebook.codebook().centroids())[0].clone());
                for j in 0..6 {
                    let size = 0.5 * old[s][j] + 0.5 * counts[s][j];
                    assert!((has[j] - size).abs() < 1e-9, "stage {s}, entry {j}: {} rows, not {size}", has[j]);
                    for (c, is) in is[j].iter().enumerate().filter(|_| counts[s][j] > 0.0) {
                        let mean = (0.5 * old[s][j] * entries[s][j][c] + 0.5 * sums[s][j][c]) / size;
                        assert!((is - mean).abs() < 1e-9, "stage {s}, entry {j}: {is}, not {mean}");
                    }
                }
            }
        }
        assert!(differing > 20, "{differing} codes are not the greedy ones");
        let error = EmaResidualQuantizer::train(&x, 2, &KMeans::new(3), ema).unwrap().beam(65).unwrap_err();
        assert_eq!(error.to_string(), "width: 65 is outside 1..=64");
    }
}
