//! Lengths of keys and values that are coded apart from their directions: what is read of them, what they keep, and what they take.

use super::{
    kv_cache::{random, tolerance, SCALE},
    kv_codes::{assert_read_alike, coded, twins_of, ALIKE, CODES, FEW, HOW, OCTAVES},
    kv_rotations::turned,
};
use crate::common::*;
use candle_core::{safetensors, DType, Device, Tensor};
use candle_flash_kmeans::nn::{ClusteredKvCache, KvBudget, KvCodes};
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use std::{collections::HashMap, path::Path};

/// Tokens that codes and gains hold are read as if there were neither, by one row and by several, whatever the budget.
#[test]
fn gains_are_read_as_what_they_stand_for() {
    for (device, codes) in devices().into_iter().flat_map(|device| CODES.map(|codes| (device.clone(), codes))) {
        for (i, (dtype, d, heads)) in [
            (DType::F64, 8, 6),
            (DType::F32, 8, 6),
            (DType::F32, 64, 6),
            (DType::BF16, 80, 20),
            (DType::F16, 96, 6),
            (DType::BF16, 112, 6),
            (DType::F16, 128, 6),
            (DType::F32, 128, 20),
            (DType::F32, 256, 6),
            (DType::F16, 256, 6),
        ]
        .into_iter()
        .enumerate()
        {
            let mut rng = rng(110);
            let (keys, values) = [(true, true), (true, false), (false, true)][i % 3];
            let lengths = [keys, values].map(|gains| if gains { OCTAVES } else { ALIKE });
            let codes = codes.clone().gains(keys, values);
            // Rotations, and one table for all pieces, are of directions as they are of rows.
            let codes = if i % 2 == 0 { codes } else { turned(&codes, d, &device) };
            let [coded, plain] = twins_of(lengths, codes.clone(), d, dtype, &device, &mut rng);
            assert_read_alike(
                &[coded, plain],
                [heads, d],
                dtype,
                (&[0, 7, 30, 80], &HOW[..3]),
                &mut rng,
                &format!("{codes:?}"),
            );
        }
    }
}

/// Tokens `(1, 2, n, d)` whose lengths are anything from 1 down to 2^-octaves.
fn of_lengths(octaves: f64, n: usize, d: usize, dtype: DType, device: &Device, rng: &mut ChaCha8Rng) -> Tensor {
    let shares = uniform(&[1, 2, n, 1], 0.5, 0.5, DType::F32, rng);
    let lengths = (shares * (-octaves * std::f64::consts::LN_2)).unwrap().exp().unwrap();
    let x = uniform(&[1, 2, n, d], 0.0, 1.0, DType::F32, rng).broadcast_mul(&lengths).unwrap();
    x.to_device(device).unwrap().to_dtype(dtype).unwrap()
}

/// The keys or the values that a file stands for, head by head in the order of the sequence, and the mean of each one's cluster. All are codes,
/// of one segment.
fn told_by(file: &HashMap<String, Tensor>, of: &str) -> Vec<(Rows, Rows)> {
    let all = |name: &str| &file[&format!("{of}_{name}")];
    let (m, bytes) = (all("codes").dims()[2], all("codes").dims()[3]);
    let &[_, heads, tables, count, columns] = all("entries").dims() else { panic!("entries have five dimensions") };
    let (d, k) = (all("means").dims()[3], all("means").dims()[2]);
    let [codes, means] = ["codes", "means"].map(|name| u32s(all(name)));
    let [entries, scales] = ["entries", "scales"].map(|name| f64s(all(name)));
    let gains = file.get(&format!("{of}_gains")).map(u32s);
    let [labels, offsets] = ["labels", "offsets"].map(|name| u32s(&file[name]));
    let of_head = |head: usize| {
        let labels = &labels[head * m..][..m];
        let mut order: Vec<usize> = (0..m).collect();
        order.sort_by_key(|&token| labels[token]);
        let (mut rows, mut of_cluster) = (vec![vec![]; m], vec![vec![]; m]);
        for (place, &token) in order.iter().enumerate() {
            let j = labels[token] as usize;
            let ends = &offsets[head * (k + 1) + j..][..2];
            assert!((ends[0]..ends[1]).contains(&(place as u32)));
            let mean = |c: usize| (f64::from(means[(head * k + j) * d + c]) - 128.0) * scales[head * k + j];
            let gain = gains.as_ref().map_or(1.0, |gains| (-f64::from(gains[head * m + place]) / 16.0).exp2());
            let entry = |c: usize| {
                let (piece, codes) = (c / columns, &codes[(head * m + place) * bytes..][..bytes]);
                let code = match count {
                    256 => codes[piece],
                    _ => codes[piece / 2] >> (piece % 2 * 4) & 15,
                };
                let table = head * tables + if tables == 1 { 0 } else { piece };
                entries[(table * count + code as usize) * columns + c % columns]
            };
            of_cluster[token] = (0..d).map(mean).collect();
            rows[token] = (0..d).map(|c| mean(c) + gain * entry(c)).collect();
        }
        (rows, of_cluster)
    };
    (0..heads).map(of_head).collect()
}

fn length(row: impl IntoIterator<Item = f64>) -> f64 {
    sum(row.into_iter().map(|v| v * v)).sqrt()
}

fn check_gains(file: &HashMap<String, Tensor>, of: &str, x: &Tensor, told: &[(Rows, Rows)]) {
    let (gains, longest) = (u32s(&file[&format!("{of}_gains")]), f64s(&file[&format!("{of}_longest")]));
    let (labels, m) = (u32s(&file["labels"]), x.dims()[2]);
    for (head, (rows, (_, means))) in problems(x).iter().zip(told).enumerate() {
        let lengths: Vec<f64> =
            rows.iter().zip(means).map(|(row, mean)| length(row.iter().zip(mean).map(|(a, b)| a - b))).collect();
        let most = largest(lengths.iter().copied());
        assert!((longest[head] / most - 1.0).abs() < 1e-5, "{of}: {} is not {most}", longest[head]);
        let mut order: Vec<usize> = (0..m).collect();
        order.sort_by_key(|&token| labels[head * m + token]);
        for (place, &token) in order.iter().enumerate() {
            let (gain, steps) = (f64::from(gains[head * m + place]), -16.0 * (lengths[token] / most).log2());
            assert!((gain - steps.min(255.0)).abs() < 0.5 + 1e-3, "{of} {token}: gain {gain} of {steps} steps");
        }
    }
}

/// A file of codes with gains says what this reads of it, number by number, and that is what the cache shows and attends to.
#[test]
fn gains_are_what_their_definition_says() {
    let folder = Folder::new("kv-gains");
    let read = |path: &Path| safetensors::load(path, &Device::Cpu).unwrap();
    for device in devices() {
        for (dtype, codes) in [
            (DType::F32, KvCodes::new().gains(true, true)),
            (DType::F32, KvCodes::new().keys(4, 8).values(2, 4).shared(true, true).gains(true, true)),
            (DType::F64, KvCodes::new().keys(2, 8).gains(true, false)),
            (DType::F32, KvCodes::new().values(2, 8).shared(true, false).gains(false, true)),
        ] {
            let what = format!("{dtype:?} {codes:?}");
            let mut rng = rng(111);
            let [k, v] = [5.0, 8.0].map(|octaves| of_lengths(octaves, 1100, 64, dtype, &device, &mut rng));
            let mut cache = ClusteredKvCache::new(0).sinks(0).recent(0).segment(1).cluster_size(30).codes(codes);
            cache.append(&k, &v).unwrap();
            assert!(cache.cluster().unwrap());
            let path = folder.0.join("cache.safetensors");
            cache.save(&path).unwrap();
            let file = read(&path);
            let [keys, values] = ["keys", "values"].map(|of| told_by(&file, of));
            for (of, x, told, shown) in [("keys", &k, &keys, cache.k()), ("values", &v, &values, cache.v())] {
                if file.contains_key(&format!("{of}_gains")) {
                    check_gains(&file, of, x, told);
                }
                let rows: Vec<f64> = told.iter().flat_map(|(rows, _)| rows.concat()).collect();
                assert_near(&shown.unwrap().unwrap(), &rows, tolerance(dtype), &format!("{what}, {of}"));
            }
            let q = random([1, 6, 1, 64], dtype, &device, &mut rng);
            let expected = problems(&q).into_iter().enumerate().flat_map(|(head, q)| {
                let (keys, values) = (&keys[head / 3].0, &values[head / 3].0);
                let all = keys.iter().zip(values).map(|(k, v)| (k.clone(), v.clone(), 1.0));
                attention(&q[0], &all.collect::<Vec<_>>(), SCALE)
            });
            let out = cache.attend(&q, SCALE, KvBudget::new(usize::MAX)).unwrap();
            assert_near(&out, &expected.collect::<Vec<_>>(), tolerance(dtype), &what);
        }
    }
}

/// Of rows of many lengths codes keep more of each, by the mean of what they lose of it, where lengths are apart.
#[test]
fn gains_keep_more() {
    for device in devices() {
        let mut rng = rng(112);
        let k = of_lengths(6.0, 1500, 16, DType::F32, &device, &mut rng);
        let [columns, pieces] = [(1, 4), (4, 8)].map(|(columns, bits)| KvCodes::new().keys(columns, bits));
        for (codes, times) in [(columns, 4.0), (pieces.clone(), 1.25), (pieces.shared(true, false), 1.25)] {
            let lost = |codes: KvCodes| {
                let mut cache = ClusteredKvCache::new(0).sinks(0).recent(0).cluster_size(1000).codes(codes);
                cache.append(&k, &k).unwrap();
                assert!(cache.cluster().unwrap());
                let shown = problems(&cache.k().unwrap().unwrap()).concat();
                let lost = problems(&k)
                    .concat()
                    .into_iter()
                    .zip(shown)
                    .map(|(row, shown)| length(row.iter().zip(&shown).map(|(a, b)| a - b)) / length(row));
                sum(lost) / 3000.0
            };
            let (plain, apart) = (lost(codes.clone()), lost(codes.clone().gains(true, false)));
            assert!(times * apart < plain, "{codes:?}: {apart} of a row with gains, {plain} without");
        }
    }
}

/// A gain is a byte of each token, and what it is a share of one number of each head.
#[test]
fn gains_are_counted() {
    for device in devices() {
        let bytes = |codes| coded(codes, 500, DType::F16, &device, &mut rng(113)).bytes();
        let (plain, heads, m) = (bytes(FEW), 2, 500 - 4 - 64);
        for (keys, values) in [(true, false), (false, true), (true, true)] {
            let rows = usize::from(keys) + usize::from(values);
            assert_eq!(bytes(FEW.gains(keys, values)) - plain, rows * heads * (m + 4));
        }
    }
}

/// Rows that are their cluster's mean have no direction, and those that are longer than half precision counts have one that it holds.
#[test]
fn no_length_and_great_lengths_have_gains() {
    for device in devices() {
        let mut rng = rng(114);
        let cache = |k: &Tensor| {
            let mut cache = ClusteredKvCache::new(0).sinks(0).recent(0).cluster_size(50).codes(FEW.gains(true, true));
            cache.append(k, k).unwrap();
            assert!(cache.cluster().unwrap());
            f64s(&cache.k().unwrap().unwrap())
        };
        for (dtype, value) in [(DType::F16, 0.0), (DType::F32, 1.0), (DType::F64, -3.0)] {
            let same = Tensor::full(value, (1, 2, 200, 64), &device).unwrap().to_dtype(dtype).unwrap();
            let worst = largest(cache(&same).into_iter().map(|v| (v - value).abs()));
            assert!(worst <= 1e-6, "{dtype:?} {value}: {worst} off");
        }
        let signs = (0..2 * 200 * 256).map(|_| if rng.random_range(0..2) == 0 { -30000f32 } else { 30000.0 });
        let signs = Tensor::from_iter(signs, &device).unwrap().reshape((1, 2, 200, 256)).unwrap();
        let lost =
            cache(&signs.to_dtype(DType::F16).unwrap()).into_iter().zip(f64s(&signs)).map(|(a, b)| (a - b).abs());
        let worst = largest(lost);
        assert!(worst <= 10_000.0, "{worst} off");
    }
}
