//! Codebooks, product and residual quantisers and their training, against plain loops.

use crate::{cache, common::*};
use candle_core::{DType, Device, Module, Tensor, Var};
use candle_flash_kmeans::{
    nn::{Codebook, Ema, EmaCodebook, GainShapeQuantizer, ProductQuantizer, ResidualQuantizer},
    Error, Init, KMeans, Metric,
};
use candle_nn::ops::softmax_last_dim;
use rand::Rng;
use std::{fs, path::PathBuf};

const FLOATS: [DType; 3] = [DType::F16, DType::F32, DType::F64];

/// Small whole numbers: distances, sums and what stages leave over are exact in every type.
fn whole(shape: &[usize], seed: u64, dtype: DType, device: &Device) -> Tensor {
    integers(shape, 6, dtype, &mut rng(seed)).to_device(device).unwrap()
}

fn codebook(shape: &[usize], seed: u64, dtype: DType, device: &Device) -> Codebook {
    Codebook::new(&whole(shape, seed, dtype, device), Metric::SquaredEuclidean).unwrap()
}

/// The rows of `x` `(..batch, n, d)` through their labels, by loops.
fn looked_up(c: &Tensor, labels: &[u32], rows_a_problem: usize) -> Vec<f64> {
    let c = problems(c);
    let entry = |(i, &l): (usize, &u32)| c[if c.len() == 1 { 0 } else { i / rows_a_problem }][l as usize].clone();
    labels.iter().enumerate().flat_map(entry).collect()
}

#[test]
fn codes_are_nearest_entries_and_decode_to_them() {
    for device in devices() {
        for dtype in FLOATS {
            for (batch, own) in [(vec![], false), (vec![3], false), (vec![3], true), (vec![2, 2], true)] {
                let shape = |tail: &[usize]| [&batch[..], tail].concat();
                let x = whole(&shape(&[40, 5]), 1, dtype, &device);
                let entries = if own { shape(&[7, 5]) } else { vec![7, 5] };
                let codebook = codebook(&entries, 2, dtype, &device);
                let codes = codebook.encode(&x).unwrap();
                assert_eq!((codes.dims(), codes.dtype()), (&shape(&[40])[..], DType::U32));
                let want = spec_labels(&x, codebook.centroids(), Metric::SquaredEuclidean);
                assert_eq!(u32s(&codes), want);
                let decoded = codebook.decode(&codes).unwrap();
                assert_eq!((decoded.dims(), decoded.dtype()), (x.dims(), dtype));
                assert_eq!(f64s(&decoded), looked_up(codebook.centroids(), &want, 40));
                assert_same(&codebook.encode(&decoded).unwrap(), &codes, "codes of what they decode to");
                let packed = codebook.encode_u8(&x).unwrap();
                assert_eq!(packed.dtype(), DType::U8);
                assert_same(&codebook.decode(&packed).unwrap(), &decoded, "of bytes");
                assert_same(&codebook.forward(&x).unwrap(), &decoded, "the layer");
            }
        }
    }
}

#[test]
fn all_codes_of_256_entries_fit_a_byte() {
    for device in devices() {
        let entries: Vec<f32> = (0..256).map(|i| i as f32).collect();
        let entries = Tensor::from_vec(entries, (256, 1), &device).unwrap();
        let codebook = Codebook::new(&entries, Metric::SquaredEuclidean).unwrap();
        let codes = codebook.encode_u8(&entries).unwrap();
        assert_eq!(u32s(&codes), (0..256).collect::<Vec<u32>>());
        assert_same(&codebook.decode(&codes).unwrap(), &entries, "decoded");
    }
}

#[test]
fn codes_of_no_entry_decode_to_nan_alone() {
    for device in devices() {
        let codebook = codebook(&[2, 3, 2], 3, DType::F32, &device);
        let codes = Tensor::new(&[[0u32, 3, 2], [u32::MAX, 1, 0]], &device).unwrap();
        let values = f64s(&codebook.decode(&codes).unwrap());
        let bad = [1, 3];
        let good = looked_up(codebook.centroids(), &[0, 0, 2, 0, 1, 0], 3);
        for (i, (got, good)) in values.iter().zip(good).enumerate() {
            assert!(if bad.contains(&(i / 2)) { got.is_nan() } else { *got == good }, "value {i}: {got}");
        }
    }
}

#[test]
fn training_is_a_fit() {
    for device in devices() {
        let x = blobs(&[2, 90, 4], 6, DType::F32, &mut rng(4)).to_device(&device).unwrap();
        let kmeans = KMeans::new(6).seed(3);
        let (codebook, fit) = (Codebook::train(&x, &kmeans).unwrap(), kmeans.fit(&x).unwrap());
        assert_same(codebook.centroids(), &fit.centroids, "entries");
        assert_same(&codebook.encode(&x).unwrap(), &fit.labels, "codes");
    }
}

#[test]
fn product_quantiser_is_a_fit_of_each_piece() {
    for device in devices() {
        let x = blobs(&[80, 12], 9, DType::F32, &mut rng(7)).to_device(&device).unwrap();
        let starts = blobs(&[3, 5, 4], 9, DType::F32, &mut rng(8)).to_device(&device).unwrap();
        let weights = uniform(&[80], 2.0, 1.0, DType::F32, &mut rng(9)).to_device(&device).unwrap();
        let kmeans = |start: Tensor| KMeans::new(5).sample_weights(&weights).init(Init::Given(start));
        let pq = ProductQuantizer::train(&x, 3, &kmeans(starts.clone())).unwrap();
        let (codes, decoded) = (pq.encode(&x).unwrap(), pq.forward(&x).unwrap());
        assert_eq!((codes.dims(), codes.dtype()), (&[80, 3][..], DType::U32));
        for piece in 0..3 {
            let rows = x.narrow(1, piece * 4, 4).unwrap();
            let alone = kmeans(starts.get(piece).unwrap()).fit(&rows).unwrap();
            assert_same(&pq.codebook().centroids().get(piece).unwrap(), &alone.centroids, "entries");
            assert_same(&codes.narrow(1, piece, 1).unwrap().squeeze(1).unwrap(), &alone.labels, "codes");
            let values = looked_up(&alone.centroids, &u32s(&alone.labels), 80);
            assert_eq!(f64s(&decoded.narrow(1, piece * 4, 4).unwrap()), values);
        }
        assert_same(&pq.decode(&codes).unwrap(), &decoded, "decoded");
        assert_same(&pq.decode(&pq.encode_u8(&x).unwrap()).unwrap(), &decoded, "of bytes");
        assert_same(&pq.encode(&decoded).unwrap(), &codes, "codes of what they decode to");
        assert_same(&pq.join(&pq.split(&x).unwrap()).unwrap(), &x, "cut and joined");
    }
}

#[test]
fn product_quantisers_of_a_batch_are_as_many() {
    for device in devices() {
        let x = blobs(&[2, 3, 60, 8], 9, DType::F16, &mut rng(10)).to_device(&device).unwrap();
        let weights = uniform(&[2, 3, 60], 2.0, 1.0, DType::F32, &mut rng(11)).to_device(&device).unwrap();
        let start = blobs(&[2, 3, 2, 4, 4], 9, DType::F16, &mut rng(12)).to_device(&device).unwrap();
        let kmeans = |w: &Tensor, s: Tensor| KMeans::new(4).sample_weights(w).init(Init::Given(s));
        let pq = ProductQuantizer::train(&x, 2, &kmeans(&weights, start.clone())).unwrap();
        let (codes, values) = (pq.encode(&x).unwrap(), pq.forward(&x).unwrap());
        assert_eq!((codes.dims(), values.dims()), (&[2, 3, 60, 2][..], x.dims()));
        assert_same(&pq.decode(&codes).unwrap(), &values, "decoded");
        for (i, j) in [(0, 0), (0, 2), (1, 1)] {
            let of = |t: &Tensor| t.get(i).unwrap().get(j).unwrap();
            let alone = ProductQuantizer::train(&of(&x), 2, &kmeans(&of(&weights), of(&start))).unwrap();
            assert_same(&of(pq.codebook().centroids()), alone.codebook().centroids(), "entries");
            assert_same(&of(&codes), &alone.encode(&of(&x)).unwrap(), "codes");
            assert_same(&of(&values), &alone.forward(&of(&x)).unwrap(), "values");
            // One problem's codebooks serve any batch.
            let shared = alone.encode(&x).unwrap();
            assert_eq!(shared.dims(), codes.dims());
            assert_same(&of(&shared), &of(&codes), "shared codes");
            assert_same(&of(&alone.decode(&shared).unwrap()), &of(&values), "shared values");
        }
    }
}

#[test]
fn residual_quantiser_codes_what_is_left_over() {
    for device in devices() {
        for (dtype, batch) in [(DType::F32, vec![]), (DType::F16, vec![2])] {
            let shape = |tail: &[usize]| [&batch[..], tail].concat();
            let x = whole(&shape(&[50, 4]), 13, dtype, &device);
            let stages: Vec<_> =
                [6, 9, 3].iter().zip(14..).map(|(&k, seed)| codebook(&shape(&[k, 4]), seed, dtype, &device)).collect();
            let rq = ResidualQuantizer::new(stages.clone()).unwrap();
            let codes = rq.encode(&x).unwrap();
            assert_eq!((codes.dims(), codes.dtype()), (&shape(&[50, 3])[..], DType::U32));
            let (mut left, mut sum) = (f64s(&x), vec![0.0; x.elem_count()]);
            for (i, stage) in stages.iter().enumerate() {
                let rows = tensor(x.dims(), dtype, |i| left[i]);
                let want = spec_labels(&rows, stage.centroids(), Metric::SquaredEuclidean);
                let place = codes.rank() - 1;
                assert_eq!(u32s(&codes.narrow(place, i, 1).unwrap()), want, "stage {i}");
                for (at, entry) in looked_up(stage.centroids(), &want, 50).into_iter().enumerate() {
                    left[at] -= entry;
                    sum[at] += entry;
                }
                let first = codes.narrow(place, 0, i + 1).unwrap();
                assert_eq!(f64s(&rq.decode(&first).unwrap()), sum, "of {} codes", i + 1);
            }
            assert_eq!(f64s(&rq.forward(&x).unwrap()), sum);
            assert_same(&rq.decode(&rq.encode_u8(&x).unwrap()).unwrap(), &rq.forward(&x).unwrap(), "of bytes");
        }
    }
}

#[test]
fn every_stage_lowers_the_error() {
    for device in devices() {
        let x = uniform(&[2, 300, 6], 0.0, 1.0, DType::F32, &mut rng(17)).to_device(&device).unwrap();
        let rq = ResidualQuantizer::train(&x, 4, &KMeans::new(8)).unwrap();
        let codes = rq.encode(&x).unwrap();
        let errors: Vec<f64> = (1..=4)
            .map(|s| (&x - rq.decode(&codes.narrow(2, 0, s).unwrap()).unwrap()).unwrap())
            .map(|left| f64s(&left).iter().map(|v| v * v).sum())
            .collect();
        assert!(errors.windows(2).all(|e| e[1] < 0.9 * e[0]), "{errors:?}");
        let alone = Codebook::train(&x, &KMeans::new(8)).unwrap();
        assert_same(rq.stages()[0].centroids(), alone.centroids(), "the first stage is a codebook");
        assert_eq!((rq.bits_per_value(), alone.bits_per_value()), (4.0 * 3.0 / 6.0, 3.0 / 6.0));
        // 8 entries of 6 f32 values a stage, over 300 rows of 6 values.
        approx::assert_relative_eq!(
            rq.bits_per_value_with_codebook(300),
            2.0 + 4.0 * (8.0 * 32.0 / 300.0),
            epsilon = 1e-12
        );
    }
}

/// All three layers: the gradient of the output is the input's, that of the loss `2 (x - values) / count`.
#[test]
fn gradients_pass_straight_through_and_commit() {
    for device in devices() {
        for dtype in [DType::F32, DType::F64] {
            let x = uniform(&[2, 30, 6], 0.0, 1.0, dtype, &mut rng(18)).to_device(&device).unwrap();
            let x = Var::from_tensor(&x).unwrap();
            let weights = uniform(&[2, 30, 6], 0.0, 1.0, dtype, &mut rng(19)).to_device(&device).unwrap();
            let codebook = Codebook::train(&x, &KMeans::new(5)).unwrap();
            let pq = ProductQuantizer::train(&x, 3, &KMeans::new(5)).unwrap();
            let rq = ResidualQuantizer::train(&x, 2, &KMeans::new(5)).unwrap();
            let layers: [(&dyn Module, Tensor); 3] = [
                (&codebook, codebook.commitment_loss(&x).unwrap()),
                (&pq, pq.commitment_loss(&x).unwrap()),
                (&rq, rq.commitment_loss(&x).unwrap()),
            ];
            for (layer, loss) in layers {
                let values = layer.forward(&x).unwrap();
                assert_same(&values, &layer.forward(&x.detach()).unwrap(), "in the graph and out of it");
                let grads = (&values * &weights).unwrap().sum_all().unwrap().backward().unwrap();
                assert_same(grads.get(&x).unwrap(), &weights, "straight through");

                let left: Vec<f64> = f64s(&x).iter().zip(f64s(&values)).map(|(x, v)| x - v).collect();
                let mean = left.iter().map(|v| v * v).sum::<f64>() / left.len() as f64;
                approx::assert_relative_eq!(f64s(&loss)[0], mean, max_relative = 1e-5);
                assert!(mean > 1e-3, "a loss that is there");
                let grad = f64s(loss.backward().unwrap().get(&x).unwrap());
                for (grad, left) in grad.iter().zip(&left) {
                    approx::assert_abs_diff_eq!(*grad, 2.0 * left / 360.0, epsilon = 1e-8);
                }
            }
        }
    }
}

/// A sum of squares past the largest f16.
#[test]
fn losses_of_halves_do_not_overflow() {
    for device in devices() {
        let codebook = Codebook::new(&ones(&[1, 8], DType::F16, &device), Metric::SquaredEuclidean).unwrap();
        let x = (ones(&[64, 8], DType::F16, &device) * 101.0).unwrap();
        let loss = codebook.commitment_loss(&x).unwrap();
        assert_eq!((loss.dtype(), f64s(&loss)[0]), (DType::F32, 10_000.0));
        let mut ema = EmaCodebook::new(codebook, Ema { decay: 0.0, eps: 0.0, ..Ema::default() }).unwrap();
        let x = (ones(&[1024, 8], DType::F16, &device) * 101.0).unwrap();
        ema.step(&x).unwrap();
        assert!(f64s(ema.codebook().centroids()).iter().all(|v| *v == 101.0), "the mean of sums past f16");
    }
}

#[test]
fn ema_step_is_the_hand_computed_one() {
    for device in devices() {
        for dtype in FLOATS {
            let (b, n, k, d) = (2, 12, 4, 3);
            let start = codebook(&[b, k, d], 20, dtype, &device);
            let settings = Ema { decay: 0.75, eps: 0.5, commitment_weight: 0.25, ..Ema::default() };
            let mut ema = EmaCodebook::new(start.clone(), settings).unwrap();
            let (mut entries, mut sizes) = (problems(start.centroids()), vec![vec![1.0; k]; b]);
            let mut averages = entries.clone();
            for step in 0..3 {
                let x = whole(&[b, n, d], 21 + step, dtype, &device);
                let out = ema.step(&x).unwrap();
                let stored = tensor(&[b, k, d], dtype, |i| entries[i / (k * d)][i / d % k][i % d]);
                let labels = spec_labels(&x, &stored, Metric::SquaredEuclidean);
                assert_eq!(u32s(&out.codes), labels);
                assert_eq!(f64s(&out.values), looked_up(&stored, &labels, n));
                let (rows, values) = (f64s(&x), f64s(&out.values));
                let loss: f64 =
                    rows.iter().zip(values).map(|(x, v)| (x - v) * (x - v)).sum::<f64>() / rows.len() as f64;
                approx::assert_relative_eq!(f64s(&out.loss)[0], 0.25 * loss, max_relative = 1e-5);
                for p in 0..b {
                    let of_problem = &labels[p * n..][..n];
                    let members = |j: usize| (0..n).filter(|&i| of_problem[i] as usize == j).collect::<Vec<_>>();
                    let count: Vec<f64> = (0..k).map(|j| members(j).len() as f64).collect();
                    let entropy: f64 = count.iter().filter(|c| **c > 0.0).map(|c| -c / 12.0 * (c / 12.0).ln()).sum();
                    approx::assert_relative_eq!(f64s(&out.usage.perplexity)[p], entropy.exp(), max_relative = 1e-12);
                    assert_eq!(u32s(&out.usage.codes_used)[p] as usize, count.iter().filter(|c| **c > 0.0).count());
                    for j in 0..k {
                        sizes[p][j] = 0.75 * sizes[p][j] + 0.25 * count[j];
                    }
                    let total: f64 = sizes[p].iter().sum();
                    for j in 0..k {
                        let smoothed = (sizes[p][j] + 0.5) / (total + 4.0 * 0.5) * total;
                        for c in 0..d {
                            let sum: f64 = members(j).iter().map(|i| rows[(p * n + i) * d + c]).sum();
                            averages[p][j][c] = 0.75 * averages[p][j][c] + 0.25 * sum;
                            // An entry without rows stays where it is.
                            if count[j] > 0.0 {
                                entries[p][j][c] = averages[p][j][c] / smoothed;
                            }
                        }
                    }
                }
                let got = f64s(ema.codebook().centroids());
                for (got, want) in got.iter().zip(entries.iter().flatten().flatten()) {
                    approx::assert_abs_diff_eq!(*got, *want, epsilon = 1.01 * ulp(*want, dtype).max(1e-14));
                }
                // The next step starts from what is stored.
                entries = problems(ema.codebook().centroids());
                let kept = f64s(&ema.cluster_size().unwrap());
                for (got, want) in kept.iter().zip(sizes.iter().flatten()) {
                    approx::assert_relative_eq!(*got, *want, max_relative = 1e-12);
                }
            }
        }
    }
}

/// Two entries among the rows, six far away.
fn mostly_dead(device: &Device) -> (Tensor, Codebook) {
    let x = blobs(&[200, 4], 8, DType::F32, &mut rng(25)).to_device(device).unwrap();
    let far = Tensor::full(1e3f32, (6, 4), device).unwrap();
    let entries = Tensor::cat(&[&x.narrow(0, 0, 2).unwrap(), &far], 0).unwrap();
    (x, Codebook::new(&entries, Metric::SquaredEuclidean).unwrap())
}

#[test]
fn dead_codes_are_revived_reproducibly() {
    for device in devices() {
        let (x, start) = mostly_dead(&device);
        let run = |threshold: f64, seed: u64| {
            let settings = Ema { threshold_ema_dead_code: threshold, seed, ..Ema::default() };
            let mut ema = EmaCodebook::new(start.clone(), settings).unwrap();
            let used: Vec<u32> = (0..12).map(|_| u32s(&ema.step(&x).unwrap().usage.codes_used)[0]).collect();
            (used, ema)
        };
        let (without, _) = run(0.0, 0);
        assert_eq!(without, [2; 12], "nothing else brings them back");
        let (with, revived) = run(1.0, 0);
        assert!(with[0] == 2 && with[11] >= 7, "{with:?}");
        let usage = revived.codebook().usage(&revived.codebook().encode(&x).unwrap()).unwrap();
        assert!(f64s(&usage.perplexity)[0] > 4.0, "{usage:?}");
        assert_same(run(1.0, 0).1.codebook().centroids(), revived.codebook().centroids(), "the same seed");
        let other = run(1.0, 1).1;
        assert_ne!(bits(other.codebook().centroids()), bits(revived.codebook().centroids()), "another seed");
    }
}

/// After one step: a dead entry is a row of the batch with the threshold as its size, and live ones are as without revival.
#[test]
fn only_dead_codes_move() {
    for device in devices() {
        let (x, start) = mostly_dead(&device);
        let step = |threshold: f64| {
            let settings = Ema { threshold_ema_dead_code: threshold, ..Ema::default() };
            let mut ema = EmaCodebook::new(start.clone(), settings).unwrap();
            ema.step(&x).unwrap();
            (problems(ema.codebook().centroids()).remove(0), f64s(&ema.cluster_size().unwrap()))
        };
        let ((plain, sizes), (revived, reset)) = (step(0.0), step(1.0));
        let rows = problems(&x).remove(0);
        for j in 0..8 {
            if sizes[j] < 1.0 {
                assert!(rows.contains(&revived[j]) && reset[j] == 1.0, "entry {j}: {:?}", revived[j]);
            } else {
                assert_eq!((&revived[j], reset[j]), (&plain[j], sizes[j]), "entry {j}");
            }
        }
        assert_eq!(sizes.iter().filter(|s| **s < 1.0).count(), 6);
        let mut distinct = revived.clone();
        distinct.sort_by(|a, b| a.partial_cmp(b).unwrap());
        distinct.dedup();
        assert_eq!(distinct.len(), 8, "no row twice");
    }
}

/// More dead entries than rows: rows are taken again.
#[test]
fn fewer_rows_than_entries_revive() {
    for device in devices() {
        let settings = Ema { threshold_ema_dead_code: 2.0, ..Ema::default() };
        let mut ema = EmaCodebook::new(codebook(&[9, 2], 26, DType::F32, &device), settings).unwrap();
        let x = whole(&[3, 2], 27, DType::F32, &device);
        ema.step(&x).unwrap();
        let rows = problems(&x).remove(0);
        assert!(problems(ema.codebook().centroids())[0].iter().all(|entry| rows.contains(entry)));
    }
}

#[test]
fn shared_codebooks_learn_from_the_whole_batch() {
    for device in devices() {
        let x = blobs(&[2, 2, 30, 3], 5, DType::F32, &mut rng(28)).to_device(&device).unwrap();
        let start = codebook(&[5, 3], 29, DType::F32, &device);
        let settings = Ema { threshold_ema_dead_code: 1.0, ..Ema::default() };
        let mut batched = EmaCodebook::new(start.clone(), settings).unwrap();
        let mut flat = EmaCodebook::new(start, settings).unwrap();
        for _ in 0..3 {
            let out = batched.step(&x).unwrap();
            assert_eq!((out.codes.dims(), out.usage.perplexity.dims()), (&[2, 2, 30][..], &[0usize; 0][..]));
            flat.step(&x.flatten_to(2).unwrap()).unwrap();
        }
        assert_same(batched.codebook().centroids(), flat.codebook().centroids(), "entries");
    }
}

/// Evenly spaced levels from the least to the largest of the last dimension's numbers, with f16 scale and offset.
fn rounded(x: &Tensor, bits: u32) -> Tensor {
    let (last, top) = (x.rank() - 1, (2f64.powi(bits as i32) - 1.0));
    let half = |t: Tensor| t.to_dtype(DType::F16).unwrap().to_dtype(x.dtype()).unwrap();
    let low = half(x.min_keepdim(last).unwrap());
    let step = half(((x.max_keepdim(last).unwrap() - &low).unwrap() / top).unwrap());
    let code = x.broadcast_sub(&low).unwrap().broadcast_div(&step).unwrap().round().unwrap().clamp(0.0, top).unwrap();
    code.broadcast_mul(&step).unwrap().broadcast_add(&low).unwrap()
}

/// A real KV cache in 2.3 bits a value, codebooks and all, against integers of two bits and scales for 64 of them (2.5):
/// keys by channel, values by token. The relative error of attention is 0.24 against 0.41.
#[test]
fn a_kv_cache_keeps_more_in_codebooks_than_in_integers() {
    const GROUP: usize = 64;
    for device in devices() {
        let cache = cache::Cache::load(&device).unwrap();
        let (heads, all, dim) = cache.keys.dims3().unwrap();
        let tokens = all / GROUP * GROUP;
        let first = |x: &Tensor| x.narrow(1, 0, tokens).unwrap().contiguous().unwrap();
        let (keys, values) = (first(&cache.keys), first(&cache.values));
        let attention = |keys: &Tensor, values: &Tensor| {
            let near = cache.queries.matmul(&cache.near_keys.transpose(1, 2).unwrap()).unwrap();
            let near = near.broadcast_add(&cache.near_mask).unwrap();
            let far = cache.queries.matmul(&keys.transpose(1, 2).unwrap()).unwrap();
            let weights = softmax_last_dim(&Tensor::cat(&[&near, &far], 2).unwrap()).unwrap();
            weights.matmul(&Tensor::cat(&[&cache.near_values, values], 1).unwrap()).unwrap()
        };
        let full = f64s(&attention(&keys, &values));
        let error = |keys: &Tensor, values: &Tensor| {
            let found = f64s(&attention(keys, values));
            let rows = found.chunks(dim).zip(full.chunks(dim));
            let relative = rows.map(|(found, full)| {
                let left: f64 = found.iter().zip(full).map(|(a, b)| (a - b) * (a - b)).sum();
                left / full.iter().map(|v| v * v).sum::<f64>()
            });
            (relative.sum::<f64>() / (full.len() / dim) as f64).sqrt()
        };

        let channels = keys.reshape((heads, tokens / GROUP, GROUP, dim)).unwrap().transpose(2, 3).unwrap();
        let channels = rounded(&channels.contiguous().unwrap(), 2).transpose(2, 3).unwrap();
        let integers = error(&channels.reshape(keys.shape()).unwrap(), &rounded(&values, 2));

        let both = Tensor::cat(&[&keys, &values], 0).unwrap().to_dtype(DType::F16).unwrap();
        let pq = ProductQuantizer::train(&both, dim / 4, &KMeans::new(128).max_iters(4)).unwrap();
        assert!(pq.bits_per_value_with_codebook(tokens) < 2.3);
        let stored = pq.forward(&both).unwrap().to_dtype(DType::F32).unwrap();
        let half = |i: usize| stored.narrow(0, i * heads, heads).unwrap();
        let codes = error(&half(0), &half(1));
        assert!(codes < 0.65 * integers, "{codes} against {integers}");
    }
}

/// Rows of numbers, most of them small, in columns that count by very different weights, and eight levels for each row.
#[test]
fn weighted_levels_beat_even_ones() {
    let (rows, inputs) = (96, 576);
    let mut rng = rng(32);
    let x = uniform(&[rows, inputs], 0.0, 1.0, DType::F32, &mut rng).powf(3.0).unwrap();
    let weights = uniform(&[inputs], 0.0, 8.0, DType::F32, &mut rng).exp().unwrap();
    for device in devices() {
        let (x, weights) = (x.to_device(&device).unwrap(), weights.to_device(&device).unwrap());
        let error = |values: &Tensor| {
            let left = (&x - values.reshape(x.shape()).unwrap()).unwrap().sqr().unwrap();
            f64s(&left.broadcast_mul(&weights).unwrap()).iter().sum::<f64>()
        };
        let own = |kmeans: KMeans| {
            let x = x.unsqueeze(2).unwrap();
            error(&Codebook::train(&x, &kmeans).unwrap().forward(&x).unwrap())
        };
        let kmeans = KMeans::new(8).init(Init::KMeansPlusPlus).max_iters(15);
        let (even, plain, weighted) =
            (error(&rounded(&x, 3)), own(kmeans.clone()), own(kmeans.sample_weights(&weights)));
        // Measured: 0.85 of centroids that know no weights, which are 0.38 of even levels.
        assert!(weighted < 0.93 * plain && plain < 0.5 * even, "{weighted}, {plain}, {even}");
    }
}

/// A file that goes away with the test.
struct File(PathBuf);

impl File {
    fn new(name: &str) -> Self {
        Self(std::env::temp_dir().join(format!("flash-kmeans-codebook-{}-{name}", std::process::id())))
    }
}

impl Drop for File {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

#[test]
fn saved_and_loaded_are_the_same() {
    let file = File::new("same");
    for device in devices() {
        for (dtype, metric) in [(DType::F32, Metric::SquaredEuclidean), (DType::BF16, Metric::Cosine)] {
            let x = blobs(&[2, 40, 6], 5, dtype, &mut rng(30)).to_device(&device).unwrap();
            let kmeans = KMeans::new(5).metric(metric);
            let codebook = Codebook::train(&x, &kmeans).unwrap();
            codebook.save(&file.0).unwrap();
            let back = Codebook::load(&file.0, &device).unwrap();
            assert_same(back.centroids(), codebook.centroids(), "codebook");
            assert_eq!(back.metric(), metric);
            assert_same(&back.encode(&x).unwrap(), &codebook.encode(&x).unwrap(), "codes");

            let pq = ProductQuantizer::train(&x, 3, &kmeans).unwrap();
            pq.save(&file.0).unwrap();
            let back = ProductQuantizer::load(&file.0, &device).unwrap();
            assert_same(&back.forward(&x).unwrap(), &pq.forward(&x).unwrap(), "product quantiser");

            let rq = ResidualQuantizer::train(&x, 3, &kmeans).unwrap();
            rq.save(&file.0).unwrap();
            let back = ResidualQuantizer::load(&file.0, &device).unwrap();
            assert_eq!(back.stages().len(), 3);
            assert_same(&back.forward(&x).unwrap(), &rq.forward(&x).unwrap(), "residual quantiser");
        }
        // Training goes on where it stopped, seeds and all.
        let (x, start) = mostly_dead(&device);
        let settings = Ema { threshold_ema_dead_code: 5.3, decay: 0.1 + 0.2, seed: u64::MAX, ..Ema::default() };
        let mut ema = EmaCodebook::new(start, settings).unwrap();
        ema.step(&x).unwrap();
        ema.save(&file.0).unwrap();
        let mut back = EmaCodebook::load(&file.0, &device).unwrap();
        assert_eq!(back.ema(), settings);
        for _ in 0..2 {
            let (a, b) = (ema.step(&x).unwrap(), back.step(&x).unwrap());
            assert_same(&a.codes, &b.codes, "codes");
            assert_same(ema.codebook().centroids(), back.codebook().centroids(), "entries");
            assert_same(&ema.cluster_size().unwrap(), &back.cluster_size().unwrap(), "sizes");
        }
    }
}

#[test]
fn other_files_are_refused() {
    let (file, device) = (File::new("other"), Device::Cpu);
    let bad = |error: Result<(), Error>, part: &str| match error {
        Err(Error::Format { reason, .. }) => assert!(reason.contains(part), "{reason:?} lacks {part:?}"),
        other => panic!("{other:?}"),
    };
    let x = blobs(&[40, 6], 5, DType::F32, &mut rng(31));
    let codebook = Codebook::train(&x, &KMeans::new(5)).unwrap();
    codebook.save(&file.0).unwrap();
    let whole = fs::read(&file.0).unwrap();
    bad(ProductQuantizer::load(&file.0, &device).map(drop), "kind");
    bad(ResidualQuantizer::load(&file.0, &device).map(drop), "kind");
    bad(EmaCodebook::load(&file.0, &device).map(drop), "kind");
    bad(KMeans::load(&file.0, &device).map(drop), "metric");
    let changed = |from: &str, to: &str| {
        assert_eq!(from.len(), to.len());
        let at = whole.windows(from.len()).position(|w| w == from.as_bytes()).expect("the text is in the header");
        let mut bytes = whole.clone();
        bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
        fs::write(&file.0, bytes).unwrap();
        Codebook::load(&file.0, &device).map(drop)
    };
    bad(changed("\"1\"", "\"2\""), "expected 1");
    bad(changed("squared_", "sqvared_"), "metric.0");
    bad(changed("centroids.0", "centroids.1"), "centroids.0");
    bad(changed("\"F32\"", "\"U32\""), "U32");
    bad(changed("[5,6]", "[ 30]"), "at least 2 dimensions");
    bad(changed("codebook\"", "codebooks"), "");
    for len in 0..whole.len() {
        fs::write(&file.0, &whole[..len]).unwrap();
        bad(Codebook::load(&file.0, &device).map(drop), "");
    }
    KMeans::new(5).fit(&x).unwrap().save(&file.0).unwrap();
    bad(Codebook::load(&file.0, &device).map(drop), "kind");
    assert!(matches!(Codebook::load(file.0.with_extension("none"), &device), Err(Error::Io { .. })));

    ResidualQuantizer::train(&x, 2, &KMeans::new(5)).unwrap().save(&file.0).unwrap();
    let mut bytes = fs::read(&file.0).unwrap();
    let text = b"stages\":\"2";
    let at = bytes.windows(text.len()).position(|w| w == text).unwrap() + text.len() - 1;
    for (count, part) in [(b'3', "metric.2"), (b'0', "stages: 0"), (b'x', "stages")] {
        bytes[at] = count;
        fs::write(&file.0, &bytes).unwrap();
        bad(ResidualQuantizer::load(&file.0, &device).map(drop), part);
    }
}

#[test]
fn refusals_name_the_argument_and_both_values() {
    #[track_caller]
    fn refused<T: std::fmt::Debug>(result: Result<T, Error>, variant: &str, parts: &[&str]) {
        let error = result.unwrap_err();
        let (name, text) = (format!("{error:?}"), error.to_string());
        assert!(name.starts_with(variant), "{name} is no {variant}");
        parts.iter().for_each(|p| assert!(text.contains(p), "{text:?} lacks {p:?}"));
    }
    for device in devices() {
        let f32s = |shape: &[usize]| ones(shape, DType::F32, &device);
        let l2 = Metric::SquaredEuclidean;
        refused(Codebook::new(&f32s(&[3]), l2), "Rank", &["centroids", "[3]"]);
        refused(Codebook::new(&ones(&[3, 3], DType::U32, &device), l2), "DType", &["centroids", "U32", "F16"]);
        refused(Codebook::new(&f32s(&[0, 3]), l2), "Range", &["centroids elements: 0"]);

        let codebook = Codebook::new(&f32s(&[4, 3]), l2).unwrap();
        refused(codebook.encode(&f32s(&[5, 2])), "Size", &["columns is 3, expected 2"]);
        refused(codebook.commitment_loss(&f32s(&[5, 2])), "Size", &["columns is 3, expected 2"]);
        refused(codebook.encode(&ones(&[5, 3], DType::F16, &device)), "DType", &["centroids", "F32", "F16"]);
        refused(codebook.encode(&f32s(&[3])), "Rank", &["x", "[3]"]);
        for dtype in [DType::I64, DType::F32] {
            let codes = ones(&[5], dtype, &device);
            refused(codebook.decode(&codes), "DType", &["codes", &format!("{dtype:?}"), "U8 or U32"]);
        }
        refused(codebook.decode(&Tensor::new(1u32, &device).unwrap()), "Shape", &["codes", "[]"]);
        let batched = Codebook::new(&f32s(&[2, 4, 3]), l2).unwrap();
        refused(batched.decode(&ones(&[3, 5], DType::U32, &device)), "Shape", &["codes", "[3, 5]", "[2, 5]"]);
        refused(codebook.usage(&(ones(&[5], DType::U32, &device) * 4.0).unwrap()), "Range", &["labels: 4", "0..=3"]);

        let large = Codebook::new(&f32s(&[257, 3]), l2).unwrap();
        refused(large.encode_u8(&f32s(&[5, 3])), "TooLarge", &["k: 257", "256"]);
        assert_eq!(large.encode(&f32s(&[5, 3])).unwrap().dtype(), DType::U32);

        refused(ProductQuantizer::new(codebook.clone()), "Rank", &["centroids", "3", "[4, 3]"]);
        let kmeans = KMeans::new(2);
        refused(ProductQuantizer::train(&f32s(&[9, 6]), 4, &kmeans), "Conflict", &["m: 4", "6 columns"]);
        refused(ProductQuantizer::train(&f32s(&[9, 6]), 0, &kmeans), "Conflict", &["m: 0", "6 columns"]);
        refused(ProductQuantizer::train(&f32s(&[6]), 2, &kmeans), "Rank", &["x", "[6]"]);
        let pq = ProductQuantizer::train(&f32s(&[9, 6]), 2, &kmeans).unwrap();
        refused(pq.encode(&f32s(&[9, 4])), "Size", &["columns is 4, expected 6"]);
        refused(pq.decode(&ones(&[9, 3], DType::U8, &device)), "Size", &["codes", "columns is 3, expected 2"]);
        refused(pq.decode(&ones(&[9], DType::U8, &device)), "Rank", &["codes", "[9]"]);
        refused(pq.join(&f32s(&[3, 9, 3])), "Shape", &["pieces", "[3, 9, 3]", "[2, 9, 3]"]);
        let wide = Codebook::new(&f32s(&[2, 257, 3]), l2).unwrap();
        let wide = ProductQuantizer::new(wide).unwrap();
        refused(wide.encode_u8(&f32s(&[9, 6])), "TooLarge", &["k: 257", "256"]);

        refused(ResidualQuantizer::new(vec![]), "Range", &["stages: 0", "1.."]);
        refused(ResidualQuantizer::train(&f32s(&[9, 6]), 0, &kmeans), "Range", &["stages: 0"]);
        let other = Codebook::new(&f32s(&[4, 2]), l2).unwrap();
        refused(ResidualQuantizer::new(vec![codebook.clone(), other]), "Shape", &["stages", "[4, 2]", "[4, 3]"]);
        let half = Codebook::new(&ones(&[4, 3], DType::F16, &device), l2).unwrap();
        refused(ResidualQuantizer::new(vec![codebook.clone(), half]), "DType", &["stages", "F16", "F32"]);
        let rq = ResidualQuantizer::new(vec![codebook.clone(), large]).unwrap();
        refused(rq.encode_u8(&f32s(&[5, 3])), "TooLarge", &["k: 257", "256"]);
        refused(rq.decode(&ones(&[9, 3], DType::U8, &device)), "Size", &["codes", "columns is 3, expected 2"]);
        refused(rq.decode(&ones(&[9], DType::U8, &device)), "Rank", &["codes", "[9]"]);
        refused(rq.encode(&f32s(&[5, 2])), "Size", &["columns is 3, expected 2"]);

        let ema = |settings: Ema| EmaCodebook::new(codebook.clone(), settings);
        refused(ema(Ema { decay: 1.5, ..Ema::default() }), "Value", &["decay: 1.5", "between 0 and 1"]);
        refused(ema(Ema { decay: f64::NAN, ..Ema::default() }), "Value", &["decay: NaN"]);
        refused(ema(Ema { eps: -1.0, ..Ema::default() }), "Value", &["eps: -1", "at least 0"]);
        refused(ema(Ema { commitment_weight: f64::INFINITY, ..Ema::default() }), "Value", &["commitment_weight: inf"]);
        let medians = Codebook::new(&f32s(&[4, 3]), Metric::Manhattan).unwrap();
        refused(EmaCodebook::new(medians, Ema::default()), "Conflict", &["metric: manhattan", "moving averages"]);
        let mut learner = ema(Ema::default()).unwrap();
        refused(learner.step(&f32s(&[0, 3])), "Range", &["x rows: 0"]);
        refused(learner.step(&f32s(&[5, 2])), "Size", &["columns is 3, expected 2"]);
    }
}

/// Rows of few directions and few lengths are what a gain-shape quantiser is made of; a codebook of as many bits is not.
#[test]
fn gain_shape_quantiser_codes_directions_and_lengths_apart() {
    for (device, dtype) in devices().into_iter().flat_map(|device| DTYPES.map(|t| (device.clone(), t))) {
        let mut rng = rng(41);
        let directions: Vec<f64> = (0..2 * 8 * 6).map(|_| rng.random_range(-1.0..1.0)).collect();
        let mut at = (0, 0.0);
        let x = tensor(&[2, 1000, 6], dtype, |i| {
            if i % 6 == 0 {
                at = (rng.random_range(0..8), rng.random_range(0.5..9.0));
            }
            directions[(i / (1000 * 6) * 8 + at.0) * 6 + i % 6] * at.1
        });
        let x = x.to_device(&device).unwrap();
        let fit = |k| KMeans::new(k).init(Init::KMeansPlusPlus).max_iters(50);
        let quantizer = GainShapeQuantizer::train(&x, &fit(8), &fit(32)).unwrap();
        let (shapes, gains) = quantizer.encode(&x).unwrap();
        let back = quantizer.decode(&shapes, &gains).unwrap();
        assert_same(&quantizer.forward(&x).unwrap(), &back, "forward");
        let error = |back: &Tensor| {
            let pairs = f64s(&x).into_iter().zip(f64s(back));
            sum(pairs.map(|(a, b)| (a - b) * (a - b))) / sum(f64s(&x).into_iter().map(|v| v * v))
        };
        let plain = ResidualQuantizer::train(&x, 2, &fit(16)).unwrap();
        assert!((plain.bits_per_value() - quantizer.bits_per_value()).abs() < 1e-12, "eight bits a row each");
        let errors = [error(&back), error(&plain.forward(&x).unwrap())];
        assert!(errors[0] < 1e-3 && 2.0 * errors[0] < errors[1], "{dtype:?}: {errors:?}");
        // Lengths are those along the directions, so that what is left over is at right angles to them.
        let unit = quantizer.shapes().decode(&shapes).unwrap();
        let norms = problems(&unit).concat();
        let off = largest(norms.iter().map(|row| (sum(row.iter().map(|v| v * v)) - 1.0).abs()));
        assert!(off < if dtype == DType::BF16 { 2e-2 } else { 2e-3 }, "{dtype:?}: a shape is {off} off unit length");

        let path = std::env::temp_dir().join(format!("gain-shape-{}-{dtype:?}.safetensors", std::process::id()));
        quantizer.save(&path).unwrap();
        let loaded = GainShapeQuantizer::load(&path, &device).unwrap();
        std::fs::remove_file(&path).unwrap();
        assert_same(&loaded.forward(&x).unwrap(), &back, "loaded");
        let refused = GainShapeQuantizer::new(quantizer.gains().clone(), quantizer.gains().clone()).unwrap_err();
        assert!(refused.to_string().contains("squared_euclidean"), "{refused}");
    }
}

/// Weights that are whole numbers are so many rows, wherever weights are taken.
#[test]
fn weights_are_repeated_rows() {
    for (device, dtype) in devices().into_iter().flat_map(|device| FLOATS.map(|t| (device.clone(), t))) {
        let x = whole(&[2, 20, 4], 50, dtype, &device);
        let weights = tensor(&[2, 20], DType::F32, |i| (i * 7 % 4) as f64).to_device(&device).unwrap();
        let index: Vec<u32> = (0..40).flat_map(|i| vec![i as u32; i * 7 % 4]).collect();
        let half = index.iter().filter(|&&i| i < 20).count();
        assert_eq!(2 * half, index.len(), "problems of one size");
        let index = Tensor::from_vec(index, 2 * half, &device).unwrap();
        let repeated = x.flatten_to(1).unwrap().index_select(&index, 0).unwrap().reshape((2, half, 4)).unwrap();
        for metric in [Metric::SquaredEuclidean, Metric::Cosine, Metric::Dot] {
            let start = whole(&[2, 3, 4], 51, dtype, &device);
            let start = Codebook::new(&(start + 0.5).unwrap(), metric).unwrap();
            let mut weighted =
                EmaCodebook::new(start.clone(), Ema { threshold_ema_dead_code: 1.5, ..Ema::default() }).unwrap();
            let mut plain = weighted.clone();
            let (a, b) = (weighted.step_weighted(&x, &weights).unwrap(), plain.step(&repeated).unwrap());
            assert_same(&weighted.cluster_size().unwrap(), &plain.cluster_size().unwrap(), "sizes");
            assert_same(&a.usage.codes_used, &b.usage.codes_used, "codes used");
            approx::assert_relative_eq!(
                f64s(&a.usage.perplexity)[0],
                f64s(&b.usage.perplexity)[0],
                max_relative = 1e-12
            );
            approx::assert_relative_eq!(f64s(&a.loss)[0], f64s(&b.loss)[0], max_relative = 1e-5);
            if metric == Metric::Cosine {
                // Thrice a rounded direction is not the direction times three.
                continue;
            }
            let kmeans = KMeans::new(3).metric(metric).init(Init::Given(start.centroids().clone()));
            let weighted =
                EmaCodebook::train(&x, &kmeans.clone().sample_weights(&weights).tol(0.0), Ema::default()).unwrap();
            let plain = EmaCodebook::train(&repeated, &kmeans.tol(0.0), Ema::default()).unwrap();
            assert_same(weighted.codebook().centroids(), plain.codebook().centroids(), "entries");
            assert_same(&weighted.cluster_size().unwrap(), &plain.cluster_size().unwrap(), "their weights");
        }
        let bad = Codebook::new(&ones(&[2, 3, 4], dtype, &device), Metric::SquaredEuclidean).unwrap();
        let mut ema = EmaCodebook::new(bad, Ema::default()).unwrap();
        for (weights, part) in [(ones(&[3], DType::F32, &device), "[3]"), (ones(&[20], DType::U32, &device), "U32")] {
            let error = ema.step_weighted(&x, &weights).unwrap_err().to_string();
            assert!(error.contains("sample_weights") && error.contains(part), "{error}");
        }
    }
}

#[test]
fn gain_shape_quantisers_take_weights_and_lengths() {
    for device in devices() {
        let x = whole(&[2, 30, 4], 52, DType::F32, &device);
        let noise = (ones(&[2, 10, 4], DType::F32, &device) * 1e3).unwrap();
        let padded = Tensor::cat(&[&x, &noise], 1).unwrap();
        let lengths = Tensor::new(&[30u32, 30], &device).unwrap();
        let kmeans = KMeans::new(5);
        let train = |x: &Tensor, shapes: &KMeans| GainShapeQuantizer::train(x, shapes, &kmeans).unwrap();
        let (got, want) = (train(&padded, &kmeans.clone().lengths(&lengths)), train(&x, &kmeans));
        assert_same(&got.forward(&x).unwrap(), &want.forward(&x).unwrap(), "by lengths");
        let weights = tensor(&[40], DType::F32, |i| (i < 30) as u8 as f64).to_device(&device).unwrap();
        let start = Init::Given(whole(&[5, 4], 53, DType::F32, &device));
        let gains = Init::Given(tensor(&[5, 1], DType::F32, |i| i as f64).to_device(&device).unwrap());
        let train = |x: &Tensor, shapes: KMeans| {
            GainShapeQuantizer::train(
                x,
                &shapes.init(start.clone()).tol(0.0),
                &kmeans.clone().init(gains.clone()).tol(0.0),
            )
            .unwrap()
        };
        let (got, want) = (train(&padded, kmeans.clone().sample_weights(&weights)), train(&x, kmeans.clone()));
        assert_same(&got.forward(&x).unwrap(), &want.forward(&x).unwrap(), "by weights");
        // Every other quantiser takes lengths, too.
        let ragged = kmeans.clone().lengths(&lengths);
        let (a, b) =
            (ProductQuantizer::train(&padded, 2, &ragged).unwrap(), ProductQuantizer::train(&x, 2, &kmeans).unwrap());
        assert_same(a.codebook().centroids(), b.codebook().centroids(), "product");
        let (a, b) =
            (ResidualQuantizer::train(&padded, 2, &ragged).unwrap(), ResidualQuantizer::train(&x, 2, &kmeans).unwrap());
        assert_same(&a.forward(&x).unwrap(), &b.forward(&x).unwrap(), "residual");
        let (a, b) =
            (EmaCodebook::train(&padded, &ragged, Ema::default()), EmaCodebook::train(&x, &kmeans, Ema::default()));
        assert_same(&a.unwrap().cluster_size().unwrap(), &b.unwrap().cluster_size().unwrap(), "sizes");
    }
}

#[test]
fn quantisers_change_dtype_and_device() {
    for device in devices() {
        let x = blobs(&[2, 40, 6], 5, DType::F32, &mut rng(54)).to_device(&device).unwrap();
        let kmeans = KMeans::new(5);
        let half = x.to_dtype(DType::F16).unwrap();
        let codebook = Codebook::train(&x, &kmeans).unwrap();
        let pq = ProductQuantizer::train(&x, 3, &kmeans).unwrap();
        let rq = ResidualQuantizer::train(&x, 3, &kmeans).unwrap();
        let gs = GainShapeQuantizer::train(&x, &kmeans, &kmeans).unwrap();
        let moved = |narrow: &dyn Module, on_host: &dyn Module, here: &dyn Module| {
            assert_eq!(narrow.forward(&half).unwrap().dtype(), DType::F16);
            let values = here.forward(&x).unwrap().to_device(&Device::Cpu).unwrap();
            assert_same(&on_host.forward(&x.to_device(&Device::Cpu).unwrap()).unwrap(), &values, "moved");
        };
        moved(&codebook.to_dtype(DType::F16).unwrap(), &codebook.to_device(&Device::Cpu).unwrap(), &codebook);
        moved(&pq.to_dtype(DType::F16).unwrap(), &pq.to_device(&Device::Cpu).unwrap(), &pq);
        moved(&rq.to_dtype(DType::F16).unwrap(), &rq.to_device(&Device::Cpu).unwrap(), &rq);
        moved(&gs.to_dtype(DType::F16).unwrap(), &gs.to_device(&Device::Cpu).unwrap(), &gs);
        let mut ema = EmaCodebook::train(&x, &kmeans, Ema::default()).unwrap();
        let mut narrow = ema.to_dtype(DType::BF16).unwrap();
        let mut moved = ema.to_device(&Device::Cpu).unwrap();
        assert_eq!(narrow.step(&x.to_dtype(DType::BF16).unwrap()).unwrap().values.dtype(), DType::BF16);
        ema.step(&x).unwrap();
        moved.step(&x.to_device(&Device::Cpu).unwrap()).unwrap();
        assert_same(
            moved.codebook().centroids(),
            &ema.codebook().centroids().to_device(&Device::Cpu).unwrap(),
            "a step",
        );
    }
}

#[test]
fn first_stages_are_a_quantiser() {
    for device in devices() {
        let x = uniform(&[50, 6], 0.0, 1.0, DType::F32, &mut rng(55)).to_device(&device).unwrap();
        let rq = ResidualQuantizer::train(&x, 3, &KMeans::new(8)).unwrap();
        let codes = rq.encode(&x).unwrap();
        for stages in 1..=3 {
            let first = rq.first(stages).unwrap();
            assert_same(&first.encode(&x).unwrap(), &codes.narrow(1, 0, stages).unwrap(), "codes");
            assert_same(
                &first.forward(&x).unwrap(),
                &rq.decode(&codes.narrow(1, 0, stages).unwrap()).unwrap(),
                "values",
            );
        }
        for stages in [0, 4, usize::MAX] {
            let error = rq.first(stages).unwrap_err().to_string();
            assert!(error.contains(&format!("stages: {stages} is outside 1..=3")), "{error}");
        }
    }
}

/// By cosine an entry is the direction of what its rows' directions add up to.
#[test]
fn ema_by_cosine_follows_directions() {
    for device in devices() {
        let start = Tensor::new(&[[2f32, 0.], [0., 3.]], &device).unwrap();
        let codebook = Codebook::new(&start, Metric::Cosine).unwrap();
        let mut ema = EmaCodebook::new(codebook, Ema { decay: 0.5, eps: 0.0, ..Ema::default() }).unwrap();
        let x = Tensor::new(&[[10f32, 0.], [3., 4.], [0., 5.]], &device).unwrap();
        let out = ema.step(&x).unwrap();
        assert_eq!(u32s(&out.codes), [0, 1, 1]);
        // Halves of (1, 0) and (1, 0), and of (0, 1) and (0.6, 1.8).
        let norm = 0.6f64.hypot(2.8);
        assert_near(ema.codebook().centroids(), &[1.0, 0.0, 0.6 / norm, 2.8 / norm], 1e-6, "directions");
        assert_eq!(f64s(&ema.cluster_size().unwrap()), [1.0, 1.5]);
    }
}

#[test]
fn states_that_cannot_be_are_refused() {
    let (file, device) = (File::new("state"), Device::Cpu);
    let codebook = codebook(&[4, 2], 56, DType::F32, &device);
    EmaCodebook::new(codebook, Ema::default()).unwrap().save(&file.0).unwrap();
    let whole = fs::read(&file.0).unwrap();
    let ones = [1f64; 4].map(f64::to_le_bytes).concat();
    let at = whole.windows(ones.len()).position(|w| w == ones).expect("the weights");
    for bad in [f64::NAN, f64::INFINITY, -1.0] {
        let mut bytes = whole.clone();
        bytes[at..at + 8].copy_from_slice(&bad.to_le_bytes());
        fs::write(&file.0, bytes).unwrap();
        assert!(matches!(EmaCodebook::load(&file.0, &device), Err(Error::Format { .. })), "{bad}");
    }
}
