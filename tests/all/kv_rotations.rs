//! Codes of rotated keys and values, and of one table for all pieces: what is read of them, what it loses, and what it takes.

use super::{
    kv_cache::{budget, empty, random, refused, spec, tolerance, SCALE},
    kv_codes::{assert_read_alike, coded, twins, CODES, FEW, HOW},
};
use crate::common::*;
use candle_core::{DType, Device, Tensor};
use candle_flash_kmeans::nn::{ClusteredAttention, ClusteredKvCache, KvBudget, KvCodes, Rotation};
use rand::{seq::SliceRandom, Rng};

/// A matrix for each of two heads that moves blocks of four columns and turns some of them round: differences that are the same number in all
/// of a block stay so, and so does the largest number of a mean.
fn moves_of_blocks(d: usize, seed: u64, device: &Device) -> Tensor {
    let mut rng = rng(seed);
    let mut of_head = || {
        let mut to: Vec<usize> = (0..d / 4).collect();
        to.shuffle(&mut rng);
        let mut rows = vec![0f32; d * d];
        for (from, &to) in to.iter().enumerate() {
            let sign = [-1.0, 1.0][rng.random_range(0..2)];
            (0..4).for_each(|i| rows[(from * 4 + i) * d + to * 4 + i] = sign);
        }
        rows
    };
    let both = [of_head(), of_head()].concat();
    Tensor::from_vec(both, (2, d, d), device).unwrap()
}

/// The same codes of keys and values whose blocks of columns are moved, by one table for all pieces.
pub fn turned(codes: &KvCodes, d: usize, device: &Device) -> KvCodes {
    let [keys, values] = [1, 2].map(|seed| Rotation::Given(moves_of_blocks(d, seed, device)));
    codes.clone().rotation(keys, values).shared(true, true)
}

/// Tokens that codes hold are read as if there were no codes and no rotation, by one row and by several, whatever the budget.
#[test]
fn rotated_codes_are_read_as_what_they_stand_for() {
    for (device, codes) in devices().into_iter().flat_map(|device| CODES.map(|codes| (device.clone(), codes))) {
        for (dtype, d, heads) in [
            (DType::F64, 8, 6),
            (DType::F32, 8, 6),
            (DType::F32, 64, 6),
            (DType::BF16, 80, 20),
            (DType::F16, 128, 6),
            (DType::F32, 256, 6),
            (DType::F16, 256, 6),
        ] {
            let mut rng = rng(100);
            let [coded, plain] = twins(turned(&codes, d, &device), d, dtype, &device, &mut rng);
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

/// All that a cache shows of tokens that are no codes is what was stored, and attention is that of what it shows.
#[test]
fn rotations_are_seen_by_nobody() {
    let [random_one, pca] = [Rotation::Random { seed: 5 }, Rotation::Pca];
    for (device, dtype) in devices().into_iter().flat_map(|device| DTYPES.map(|t| (device.clone(), t))) {
        for (keys, values, columns) in [
            (random_one.clone(), pca.clone(), 12),
            (pca.clone(), Rotation::None, 8),
            (Rotation::None, random_one.clone(), 8),
        ] {
            let what = format!("{dtype:?}, {keys:?}, {values:?}");
            let mut rng = rng(101);
            let mut cache = empty().codes(FEW.shared(true, false).rotation(keys, values));
            let [k, v] = [8, columns].map(|d| random([2, 2, 150, d], dtype, &device, &mut rng));
            let part = |t: &Tensor, start: usize, n: usize| t.narrow(2, start, n).unwrap();
            let shown = |cache: &mut ClusteredKvCache, start: usize, n: usize| {
                let both = cache.append(&part(&k, start, n), &part(&v, start, n)).unwrap();
                for (shown, t) in [(both.0, &k), (both.1, &v)] {
                    let end = shown.narrow(2, shown.dims()[2] - n, n).unwrap();
                    assert_near(&end, &f64s(&part(t, start, n)), tolerance(dtype), &what);
                }
            };
            shown(&mut cache, 0, 120);
            // Before there are codes it is what was stored to the bit.
            assert_same(&cache.k().unwrap().unwrap(), &part(&k, 0, 120), &what);
            assert!(cache.cluster().unwrap());
            shown(&mut cache, 120, 30);
            let (all_keys, all_values) = (cache.k().unwrap().unwrap(), cache.v().unwrap().unwrap());
            for (all, t) in [(&all_keys, &k), (&all_values, &v)] {
                for (start, n) in [(0, 3), (110, 40)] {
                    assert_near(&part(all, start, n), &f64s(&part(t, start, n)), tolerance(dtype), &what);
                }
            }
            // A cache without codes that holds what this one shows.
            let mut plain = empty();
            plain.append(&all_keys, &all_values).unwrap();
            for rows in [1, 3] {
                let q = random([2, 6, rows, 8], dtype, &device, &mut rng);
                let all = (150, true, false);
                let out = cache.attend(&q, SCALE, budget(all)).unwrap();
                assert_near(&out, &spec(&plain, &q, all), 2.0 * tolerance(dtype), &format!("{what}, {rows} rows"));
            }
        }
    }
}

/// The squared error of keys in a few large clusters, as a share of their squares.
fn lost(codes: KvCodes, k: &Tensor) -> f64 {
    let mut cache = ClusteredKvCache::new(0).sinks(0).recent(0).cluster_size(500).codes(codes);
    cache.append(k, k).unwrap();
    assert!(cache.cluster().unwrap());
    let squares = |t: &Tensor| sum(f64s(t).into_iter().map(|v| v * v));
    squares(&(cache.k().unwrap().unwrap() - k).unwrap()) / squares(k)
}

/// Where columns depend on each other principal components lose less, and where one table has to serve a column of another scale than
/// the others a rotation does.
#[test]
fn rotations_keep_more() {
    for device in devices() {
        let mut rng = rng(102);
        let x = uniform(&[1, 2, 2000, 16], 0.0, 1.0, DType::F32, &mut rng);
        let mix = uniform(&[16, 16], 0.0, 1.0, DType::F32, &mut rng);
        let (falling, one_large) = (|i: usize| 0.6f64.powi(i as i32), |i: usize| if i == 5 { 10.0 } else { 1.0 });
        let scaled = |scale: &dyn Fn(usize) -> f64| x.broadcast_mul(&tensor(&[16], DType::F32, scale)).unwrap();
        let mixed = scaled(&falling).broadcast_matmul(&mix).unwrap().to_device(&device).unwrap();
        let scaled = scaled(&one_large).to_device(&device).unwrap();
        let pieces = KvCodes::new().keys(4, 8);
        let turned = |codes: &KvCodes, rotation| codes.clone().rotation(rotation, Rotation::None);
        let (plain, pca) = (lost(pieces.clone(), &mixed), lost(turned(&pieces, Rotation::Pca), &mixed));
        assert!(2.0 * pca < plain, "{pca} by components, {plain} without");
        let one = KvCodes::new().keys(1, 4).shared(true, false);
        let (plain, random) = (lost(one.clone(), &scaled), lost(turned(&one, Rotation::Random { seed: 1 }), &scaled));
        assert!(1.2 * random < plain, "{random} by a random rotation, {plain} without");
    }
}

/// A shared table is there once, and so is a rotation of all heads.
#[test]
fn shared_tables_and_rotations_are_counted_once() {
    for device in devices() {
        let bytes = |codes| coded(codes, 3000, DType::F16, &device, &mut rng(103)).bytes();
        let (new, d, heads) = (KvCodes::new, 64, 2);
        let plain = bytes(new());
        assert_eq!(plain - bytes(new().shared(true, false)), heads * 2 * 16 * (d - 1));
        assert_eq!(plain - bytes(new().shared(false, true)), heads * 2 * 256 * (d - 4));
        let random = || Rotation::Random { seed: 1 };
        assert_eq!(bytes(new().rotation(random(), Rotation::None)) - plain, 4 * d * d);
        assert_eq!(bytes(new().rotation(random(), Rotation::Pca)) - plain, (1 + heads) * 4 * d * d);
    }
}

/// Layers that are clustered together have the codes that they would have alone, each with its own rotation.
#[test]
fn rotations_do_not_depend_on_neighbours() {
    for device in devices() {
        let mut rng = rng(104);
        let tokens: Vec<_> = (0..3).map(|_| random([2, 2, 160, 8], DType::F32, &device, &mut rng)).collect();
        let given = |layer: u64| Rotation::Given(moves_of_blocks(8, layer, &device));
        for components in [false, true] {
            let filled = |layer: usize| {
                let values = if components { Rotation::Pca } else { given(layer as u64 + 7) };
                let codes = FEW.rotation(given(layer as u64), values);
                let mut cache = ClusteredKvCache::new(160).segment(1).max_segment(40).codes(codes);
                cache.append(&tokens[layer], &(&tokens[layer] * 2.0).unwrap()).unwrap();
                cache
            };
            let mut together: Vec<_> = (0..3).map(filled).collect();
            assert!(ClusteredKvCache::cluster_layers(&mut together).unwrap());
            for (i, layer) in together.iter().enumerate() {
                let mut alone = filled(i);
                assert!(alone.cluster().unwrap());
                for (a, b) in [(alone.k(), layer.k()), (alone.v(), layer.v())] {
                    assert_same(&a.unwrap().unwrap(), &b.unwrap().unwrap(), &format!("layer {i}"));
                }
            }
        }
    }
}

/// A file gives back a cache with its rotations, found or not yet, to the bit; it goes on as the one that was written.
#[test]
fn files_hold_rotations() {
    let folder = Folder::new("kv-rotations");
    let path = folder.0.join("cache.safetensors");
    for (device, dtype) in devices().into_iter().flat_map(|device| DTYPES.map(|t| (device.clone(), t))) {
        let given = |seed| Rotation::Given(moves_of_blocks(8, seed, &device));
        for (keys, values) in [
            (Rotation::Random { seed: u64::MAX }, Rotation::None),
            (Rotation::None, Rotation::Pca),
            (given(4), given(5)),
            (Rotation::Pca, Rotation::Random { seed: 0 }),
        ] {
            for (evicted, n) in [(0, 60), (5, 120), (110, 120)] {
                let what = format!("{dtype:?}, {keys:?}, {values:?}, {n} tokens, {evicted} evicted");
                let mut rng = rng(105);
                let codes = FEW.shared(true, n > 100).rotation(keys.clone(), values.clone());
                let mut cache = empty().max_segment(50).codes(codes);
                let [k, v] = [(); 2].map(|_| random([2, 2, n + 60, 8], dtype, &device, &mut rng));
                let part = |t: &Tensor, start, len| t.narrow(2, start, len).unwrap();
                cache.append(&part(&k, 0, n), &part(&v, 0, n)).unwrap();
                assert_eq!(cache.cluster().unwrap(), n > 100);
                cache.evict(evicted).unwrap();
                cache.save(&path).unwrap();
                let mut back = ClusteredKvCache::load(&path, &device).unwrap();
                let q = random([2, 4, 1, 8], dtype, &device, &mut rng);
                for more in 0..2 {
                    assert_eq!((cache.current_seq_len(), cache.bytes()), (back.current_seq_len(), back.bytes()));
                    assert_same(&cache.v().unwrap().unwrap(), &back.v().unwrap().unwrap(), &what);
                    let [a, b] = [&cache, &back].map(|c| c.attend(&q, SCALE, KvBudget::new(9)).unwrap());
                    assert_same(&a, &b, &what);
                    for cache in [&mut cache, &mut back] {
                        cache.append(&part(&k, n + 30 * more, 30), &part(&v, n + 30 * more, 30)).unwrap();
                        cache.cluster().unwrap();
                    }
                }
            }
        }
    }
}

/// Steps of a model over rotated codes: a prompt, then token by token; a reset begins anew.
#[test]
fn steps_go_on_over_rotated_codes() {
    for device in devices() {
        let mut rng = rng(106);
        let cache = || ClusteredKvCache::new(400).segment(40);
        let codes = FEW.values(1, 4).shared(false, true).rotation(Rotation::Pca, Rotation::Random { seed: 2 });
        let budget = KvBudget::new(usize::MAX);
        let mut layers = [cache().codes(codes), cache()].map(|cache| ClusteredAttention::new(cache, budget));
        for round in 0..2 {
            for step in 0..50 {
                let n = if step == 0 { 300 } else { 1 };
                let [q, k, v] = [4, 2, 2].map(|heads| random([2, heads, n, 16], DType::F32, &device, &mut rng));
                let offset = layers[0].offset();
                let [a, b] = layers.each_mut().map(|layer| layer.forward(&q, &k, &v, offset).unwrap());
                // What is uniform is normal once it is rotated, of which codes keep less.
                let most = if step == 0 { 1e-5 } else { 0.2 };
                assert_near(&a, &f64s(&b), most, &format!("round {round}, step {step}"));
            }
            layers.iter_mut().for_each(ClusteredAttention::reset);
        }
    }
}

#[test]
fn refusals_of_rotations_are_typed() {
    for device in devices() {
        let mut rng = rng(107);
        let [k, v] = [64, 12].map(|d| random([1, 2, 100, d], DType::F32, &device, &mut rng));
        let eye = |d| Tensor::eye(d, DType::F32, &device).unwrap();
        let append = |keys, values| {
            let codes = FEW.rotation(keys, values);
            ClusteredKvCache::new(100).codes(codes).append(&k, &v).map(|_| ())
        };
        let given = Rotation::Given;
        refused(append(given(eye(12)), Rotation::None), "Shape", &["rotation", "[12, 12]", "[64, 64]"]);
        refused(append(Rotation::Pca, given(eye(64))), "Shape", &["rotation", "[64, 64]", "[12, 12]"]);
        let heads = eye(12).unsqueeze(0).unwrap().repeat((3, 1, 1)).unwrap();
        refused(append(Rotation::None, given(heads)), "Shape", &["rotation", "[3, 12, 12]", "[2, 12, 12]"]);
        let longer = (eye(12) * 1.1).unwrap();
        refused(append(Rotation::None, given(longer)), "Value", &["rotation", "orthogonal"]);
        append(given(eye(64)), given(eye(12))).unwrap();
        // Codes that are asked for when there are tokens already are looked at when the tokens become codes.
        let mut cache = ClusteredKvCache::new(100).recent(0).segment(1);
        cache.append(&k, &v).unwrap();
        let mut cache = cache.codes(FEW.rotation(given(eye(12)), Rotation::None));
        refused(cache.cluster(), "Shape", &["rotation", "[12, 12]", "[64, 64]"]);
        assert_eq!(cache.current_seq_len(), 100);
    }
}

/// A damaged rotation is refused, and so is one of other columns.
#[test]
fn damaged_rotations_are_refused() {
    let (folder, mut rng) = (Folder::new("kv-rotations-damaged"), rng(108));
    let path = folder.0.join("cache.safetensors");
    let codes = FEW.shared(true, true).rotation(Rotation::Pca, Rotation::Random { seed: 1 });
    coded(codes, 140, DType::F32, &Device::Cpu, &mut rng).save(&path).unwrap();
    let bytes = std::fs::read(&path).unwrap();
    for at in (0..bytes.len()).step_by(1997) {
        let mut damaged = bytes.clone();
        damaged[at] ^= 1 << (at % 8);
        std::fs::write(&path, damaged).unwrap();
        assert!(ClusteredKvCache::load(&path, &Device::Cpu).is_err(), "byte {at}");
    }
}
