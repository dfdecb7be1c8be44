//! The attention layer against dense attention in f64, call by call, with everything that models ask of it.

use crate::common::*;
use candle_core::{DType, Device, Tensor};
use candle_flash_kmeans::nn::{ClusteredAttention, ClusteredKvCache, KvBudget};
use candle_flash_kmeans::Error;
use rand_chacha::ChaCha8Rng;

const BATCH: usize = 2;
const KV_HEADS: usize = 2;
const HEADS: usize = 6;

/// What a model has.
#[derive(Clone, Copy, Debug)]
struct Options {
    scale: Option<f64>,
    softcap: Option<f64>,
    window: Option<usize>,
    /// Columns of queries and keys.
    d: usize,
    /// Columns of values.
    width: usize,
    padding: Option<[usize; BATCH]>,
}

const PLAIN: Options = Options { scale: None, softcap: None, window: None, d: 8, width: 8, padding: None };

/// All queries, keys and values of a conversation.
struct Tokens {
    q: Tensor,
    k: Tensor,
    v: Tensor,
}

impl Tokens {
    /// Whole 64ths up to 127, one of which each token has, so that a cluster of one token has its mean to the bit. NaN for whatever is
    /// padding.
    fn random(n: usize, options: Options, dtype: DType, device: &Device, rng: &mut ChaCha8Rng) -> Self {
        let mut random = |heads: usize, columns: usize| {
            let t = uniform(&[BATCH, heads, n, columns], 0.0, 2.0, DType::F64, rng);
            let starts = options.padding.unwrap_or_default();
            let values = f64s(&t).into_iter().enumerate().map(|(i, v)| {
                let (sequence, token) = (i / columns / n / heads, i / columns % n);
                if token < starts[sequence] {
                    f64::NAN
                } else if i % columns == token % columns {
                    f64::copysign(127.0 / 64.0, v)
                } else {
                    (v * 63.0).round() / 64.0
                }
            });
            let t = Tensor::from_iter(values, &Device::Cpu).unwrap().reshape(t.dims()).unwrap();
            t.to_dtype(dtype).unwrap().to_device(device).unwrap()
        };
        Self { q: random(HEADS, options.d), k: random(KV_HEADS, options.d), v: random(KV_HEADS, options.width) }
    }

    fn part(&self, start: usize, count: usize) -> [Tensor; 3] {
        [&self.q, &self.k, &self.v].map(|t| t.narrow(2, start, count).unwrap())
    }

    /// Dense attention of the tokens `start..start + count`; a token of the padding gives zeros. `mask` is what is added to the score of
    /// a head's row and token, instead of the causal rule.
    fn dense(
        &self,
        options: Options,
        start: usize,
        count: usize,
        mask: Option<&dyn Fn([usize; 4]) -> f64>,
    ) -> Vec<f64> {
        let [queries, keys, values] = [&self.q, &self.k, &self.v].map(problems);
        let scale = options.scale.unwrap_or(1.0 / (options.d as f64).sqrt());
        let mut output = vec![];
        for b in 0..BATCH {
            let first = options.padding.map_or(0, |starts| starts[b]);
            for h in 0..HEADS {
                let kv = b * KV_HEADS + h / (HEADS / KV_HEADS);
                for (row, query) in queries[b * HEADS + h].iter().enumerate().skip(start).take(count) {
                    let seen = (first..start + count).filter(|&token| {
                        mask.is_some() || token <= row && options.window.is_none_or(|w| row - token < w)
                    });
                    let seen: Vec<usize> = seen.collect();
                    let score = |&token: &usize| {
                        let score = dot(query, &keys[kv][token]) * scale;
                        let score = options.softcap.map_or(score, |cap| cap * (score / cap).tanh());
                        score + mask.map_or(0.0, |mask| mask([b, h, row, token]))
                    };
                    let weights: Vec<f64> = seen.iter().map(score).map(f64::exp).collect();
                    let total = if row < first { 1.0 } else { sum(weights.iter().copied()) };
                    output.extend(
                        (0..options.width).map(|i| {
                            sum(seen.iter().zip(&weights).map(|(&token, w)| w * values[kv][token][i])) / total
                        }),
                    );
                }
            }
        }
        output
    }
}

/// Small clusters and segments, and room for less than a test stores.
fn cache() -> ClusteredKvCache {
    ClusteredKvCache::new(40).sinks(3).recent(10).cluster_size(4).segment(8)
}

fn layer(cache: ClusteredKvCache, budget: usize, options: Options, device: &Device) -> ClusteredAttention {
    let mut layer = ClusteredAttention::new(cache, KvBudget::new(budget).dense_if_cheaper(false));
    layer = layer.softcap(options.softcap).sliding_window(options.window);
    if let Some(scale) = options.scale {
        layer = layer.softmax_scale(scale);
    }
    if let Some(starts) = options.padding {
        let starts = starts.map(|start| start as u32);
        layer.left_padding(&Tensor::new(&starts, device).unwrap()).unwrap();
    }
    layer
}

#[track_caller]
fn assert_close(got: &Tensor, expected: &[f64], tolerance: f64, what: &str) {
    assert!(f64s(got).iter().chain(expected).all(|v| v.is_finite()), "{what}: not finite");
    assert_near(got, expected, tolerance, what);
}

/// A prompt, single tokens, a further prompt, single tokens: every one of them as dense attention has it.
#[track_caller]
fn converse(layer: &mut ClusteredAttention, tokens: &Tokens, options: Options, tolerance: f64, what: &str) {
    let mut start = layer.offset();
    for count in [45].into_iter().chain([1; 30]).chain([17]).chain([1; 20]) {
        let [q, k, v] = tokens.part(start, count);
        let out = layer.forward(&q, &k, &v, start).unwrap();
        assert_eq!((out.dims(), out.dtype()), (&[BATCH, HEADS, count, options.width][..], q.dtype()), "{what}");
        let expected = tokens.dense(options, start, count, None);
        assert_close(&out, &expected, tolerance, &format!("{what}, {count} from {start}"));
        start += count;
        assert_eq!(layer.offset(), start);
    }
}

const LENGTH: usize = 45 + 30 + 17 + 20;

fn tolerance(dtype: DType) -> f64 {
    match dtype {
        DType::F16 => 2e-2,
        DType::BF16 => 1e-1,
        DType::F32 => 5e-5,
        _ => 1e-11,
    }
}

#[test]
fn a_budget_for_all_is_dense_attention() {
    for (device, dtype) in devices().into_iter().flat_map(|device| DTYPES.map(|t| (device.clone(), t))) {
        let tokens = Tokens::random(LENGTH, PLAIN, dtype, &device, &mut rng(80));
        let mut layer = layer(cache(), usize::MAX, PLAIN, &device);
        converse(&mut layer, &tokens, PLAIN, tolerance(dtype), &format!("{dtype:?}"));
        assert!(layer.cache().clusters().unwrap().labels.dims()[2] > 80, "clustered by itself");
    }
}

/// A cluster of one token estimates it exactly, so that every budget gives dense attention, through the clusters.
#[test]
fn options_are_those_of_dense_attention() {
    let all = [
        Options { scale: Some(0.1), ..PLAIN },
        Options { softcap: Some(1.5), ..PLAIN },
        Options { width: 5, ..PLAIN },
        Options { padding: Some([9, 0]), ..PLAIN },
        Options { padding: Some([2, 44]), softcap: Some(3.0), width: 11, ..PLAIN },
        Options { window: Some(1), ..PLAIN },
        Options { window: Some(7), softcap: Some(2.0), ..PLAIN },
        Options { window: Some(20), padding: Some([0, 30]), width: 3, ..PLAIN },
        Options { window: Some(1000), scale: Some(0.5), ..PLAIN },
        // Where a GPU has a kernel, for the first of them.
        Options { d: 64, width: 64, ..PLAIN },
        Options { d: 64, width: 64, softcap: Some(1.5), ..PLAIN },
        Options { d: 64, width: 64, padding: Some([9, 0]), ..PLAIN },
        Options { d: 64, width: 32, ..PLAIN },
    ];
    for (device, options) in devices().into_iter().flat_map(|device| all.map(|options| (device.clone(), options))) {
        for dtype in [DType::F64, DType::F32] {
            let tokens = Tokens::random(LENGTH, options, dtype, &device, &mut rng(81));
            for budget in [0, 5, usize::MAX] {
                let mut layer = layer(cache().cluster_size(1), budget, options, &device);
                let what = format!("{dtype:?} {options:?}, budget {budget}");
                converse(&mut layer, &tokens, options, tolerance(dtype), &what);
                assert_eq!(layer.cache().clusters().is_some(), options.window.is_none(), "{what}");
            }
        }
    }
}

/// What a budget leaves out is missed, and rows of drafts miss it too if they may.
#[test]
fn budgets_are_kept() {
    for device in devices() {
        let tokens = Tokens::random(200, PLAIN, DType::F64, &device, &mut rng(82));
        let [q, k, v] = tokens.part(0, 197);
        let mut prompt = layer(cache(), 0, PLAIN, &device);
        prompt.forward(&q, &k, &v, 0).unwrap();
        let [q, k, v] = tokens.part(197, 3);
        let want = tokens.dense(PLAIN, 197, 3, None);
        let error = |layer: &mut ClusteredAttention| {
            let out = f64s(&layer.forward(&q, &k, &v, 197).unwrap());
            largest(out.iter().zip(&want).map(|(a, b)| (a - b).abs()))
        };
        let drafts = prompt.clone().clustered_rows(3);
        assert!(error(&mut prompt.clone()) < 1e-11, "three rows are a prompt");
        let [none, some] = [0, 150].map(|tokens| {
            let mut layer = drafts.clone();
            layer.set_budget(KvBudget::new(tokens).estimate(false).dense_if_cheaper(false));
            error(&mut layer)
        });
        assert!(none > 1e-2 && some < none / 2.0 && some > 1e-11, "{none} and {some}");
        let mut drafts = drafts;
        drafts.set_budget(KvBudget::new(184).dense_if_cheaper(false));
        assert!(error(&mut drafts) < 1e-11, "all of them");
    }
}

/// Masks say what a row sees, also what comes after it.
#[test]
fn masks_are_added_to_scores() {
    for (device, dtype) in
        devices().into_iter().flat_map(|device| [DType::F64, DType::F32].map(|t| (device.clone(), t)))
    {
        let options = Options { softcap: Some(4.0), width: 5, ..PLAIN };
        let tokens = Tokens::random(80, options, dtype, &device, &mut rng(83));
        for (batch, heads) in [(BATCH, HEADS), (1, HEADS), (BATCH, 1), (1, 1)] {
            let mut layer = layer(cache(), 3, options, &device);
            let mut start = 0;
            for count in [50, 1, 12, 1] {
                let mask = uniform(&[batch, heads, count, start + count], 0.0, 3.0, DType::F64, &mut rng(84));
                // One token in five is hidden.
                let hide = |(i, v)| if i % 5 == 2 { f64::NEG_INFINITY } else { v };
                let values: Vec<f64> = f64s(&mask).into_iter().enumerate().map(hide).collect();
                let at = |[b, h, row, token]: [usize; 4]| {
                    values[((b.min(batch - 1) * heads + h.min(heads - 1)) * count + row - start) * (start + count)
                        + token]
                };
                let given = Tensor::from_vec(values.clone(), mask.dims(), &Device::Cpu).unwrap();
                let given = given.to_dtype(DType::F32).unwrap().to_device(&device).unwrap();
                let [q, k, v] = tokens.part(start, count);
                let out = layer.forward_masked(&q, &k, &v, start, &given).unwrap();
                let what = format!("{dtype:?}, mask {:?}", mask.dims());
                assert_close(&out, &tokens.dense(options, start, count, Some(&at)), 1e-5, &what);
                start += count;
            }
        }
    }
}

/// Scores of a prompt that passes the size of a block many times, with and without a window.
#[test]
fn long_prompts_are_read_in_blocks() {
    for (device, window) in devices().into_iter().flat_map(|device| [None, Some(500)].map(|w| (device.clone(), w))) {
        let mut rng = rng(85);
        let [q, k, v] =
            [8, 2, 2].map(|h| uniform(&[1, h, 3000, 16], 0.0, 2.0, DType::F32, &mut rng).to_device(&device).unwrap());
        let options = Options { window, ..PLAIN };
        let out = layer(ClusteredKvCache::new(3000), 9, options, &device).forward(&q, &k, &v, 0).unwrap();
        for row in [0, 1, 499, 500, 501, 700, 1400, 2999] {
            let start = window.map_or(0, |w| (row + 1usize).saturating_sub(w));
            let [k, v] = [&k, &v].map(|t| t.narrow(2, start, row + 1 - start).unwrap());
            let mut alone = ClusteredKvCache::new(3000);
            alone.append(&k, &v).unwrap();
            let want = alone.attend(&q.narrow(2, row, 1).unwrap(), 0.25, KvBudget::new(usize::MAX)).unwrap();
            assert_close(&out.narrow(2, row, 1).unwrap(), &f64s(&want), 2e-5, &format!("row {row}, {window:?}"));
        }
    }
}

/// A layer with a window stores little more than two of them, and drafts can be taken back.
#[test]
fn windows_forget_what_has_left_them() {
    for device in devices() {
        let options = Options { window: Some(12), ..PLAIN };
        let tokens = Tokens::random(300, options, DType::F64, &device, &mut rng(86));
        let mut layer = layer(cache(), 9, options, &device);
        let [q, k, v] = tokens.part(0, 100);
        layer.forward(&q, &k, &v, 0).unwrap();
        let mut most = 0;
        let mut start = 100;
        for step in 0..150 {
            let [q, k, v] = tokens.part(start, 1);
            let out = layer.forward(&q, &k, &v, start).unwrap();
            assert_close(&out, &tokens.dense(options, start, 1, None), 1e-11, &format!("step {step}"));
            most = most.max(layer.cache().current_seq_len());
            start += 1;
            if step % 10 == 9 {
                // The ten of `recent` can always be.
                let back = 1 + step % 7;
                layer.truncate(start - back).unwrap();
                start -= back;
            }
        }
        // Sinks, two windows and the recent ones.
        assert!(most <= 3 + 2 * 12 + 10, "{most} tokens");
        let min = layer.cache().evicted() + 3 + 12;
        refused(layer.truncate(min - 1), "Range", &["offset", &(min - 1).to_string(), &format!("{min}..=")]);
    }
}

/// A conversation goes on from any token of it, clustered or not, and from a file.
#[test]
fn conversations_go_on_from_where_they_are_cut() {
    let folder = Folder::new("attention");
    let path = folder.0.join("prompt.safetensors");
    for (device, padding) in devices().into_iter().flat_map(|device| [None, Some([0, 7])].map(|p| (device.clone(), p)))
    {
        let options = Options { padding, ..PLAIN };
        let tokens = Tokens::random(100, options, DType::F64, &device, &mut rng(88));
        let mut whole = layer(cache().cluster_size(1), 5, options, &device);
        let [q, k, v] = tokens.part(0, 90);
        whole.forward(&q, &k, &v, 0).unwrap();
        for kept in [90, 89, 81, 80, 50, 11, 3, 0] {
            let mut cut = whole.clone();
            cut.truncate(kept).unwrap();
            cut.cache().save(&path).unwrap();
            let back = ClusteredKvCache::load(&path, &device).unwrap();
            for mut layer in [cut, ClusteredAttention::new(back, KvBudget::new(5).dense_if_cheaper(false))] {
                for (start, count) in [(kept, 1), (kept + 1, 8), (kept + 9, 1)] {
                    let [q, k, v] = tokens.part(start, count);
                    let out = layer.forward(&q, &k, &v, start).unwrap();
                    let expected = tokens.dense(options, start, count, None);
                    assert_close(&out, &expected, 1e-11, &format!("{start} after {kept}, padding {padding:?}"));
                }
            }
        }
        refused(whole.truncate(91), "Range", &["offset: 91", "0..=90"]);
    }
}

/// Layers that cluster by themselves end as those that are clustered together.
#[test]
fn layers_are_clustered_alone_or_together() {
    for device in devices() {
        let mut rng = rng(87);
        let [prompt, more] = [70, 1].map(|n| Tokens::random(n, PLAIN, DType::F32, &device, &mut rng));
        let windowed = Options { window: Some(9), ..PLAIN };
        let layers = [PLAIN, windowed, PLAIN].map(|options| layer(cache(), 9, options, &device));
        let (mut alone, mut together) = (layers.clone(), layers.map(|layer| layer.auto_cluster(false)));
        for (tokens, offset) in [(&prompt, 0)].into_iter().chain((70..90).map(|offset| (&more, offset))) {
            for layer in alone.iter_mut().chain(&mut together) {
                layer.forward(&tokens.q, &tokens.k, &tokens.v, offset).unwrap();
            }
            ClusteredAttention::cluster_layers(&mut together).unwrap();
        }
        for (a, b) in alone.iter().zip(&together) {
            match (a.cache().clusters(), b.cache().clusters()) {
                (Some(a), Some(b)) => {
                    assert_eq!(a.labels.dims(), [2, 2, 73]);
                    assert_same(&a.labels, &b.labels, "labels");
                    assert_same(&a.mean_keys.scales, &b.mean_keys.scales, "mean keys");
                }
                (a, b) => assert!(a.is_none() && b.is_none()),
            }
        }
        assert!(alone[1].cache().clusters().is_none() && alone[2].cache().clusters().is_some());
    }
}

#[track_caller]
fn refused<T: std::fmt::Debug>(result: Result<T, Error>, variant: &str, parts: &[&str]) {
    let error = result.unwrap_err();
    let (name, text) = (format!("{error:?}"), error.to_string());
    assert!(name.starts_with(variant), "{name} is no {variant}");
    parts.iter().for_each(|p| assert!(text.contains(p), "{text:?} lacks {p:?}"));
}

/// A call that is refused leaves the layer as it was.
#[test]
fn refusals_are_typed_and_leave_no_tokens() {
    for device in devices() {
        let x = |heads, n, d| ones(&[2, heads, n, d], DType::F32, &device);
        let mut layer = layer(cache(), 9, PLAIN, &device);
        let (q, k) = (x(6, 20, 8), x(2, 20, 8));
        refused(layer.forward(&q, &k, &k, 3), "Size", &["offset", "tokens before is 3", "expected 0"]);
        layer.forward(&q, &k, &k, 0).unwrap();
        refused(layer.forward(&q, &k, &k, 0), "Size", &["offset", "tokens before is 0", "expected 20"]);
        refused(layer.forward(&q, &k, &k, 21), "Size", &["offset", "21", "20"]);
        refused(layer.forward(&x(6, 19, 8), &k, &k, 20), "Shape", &["q", "19", "20"]);
        refused(layer.forward(&x(5, 20, 8), &k, &k, 20), "Conflict", &["q: 5 heads", "2"]);
        refused(layer.forward(&q, &k, &x(2, 19, 8), 20), "Shape", &["v", "19", "20"]);
        refused(layer.forward(&q, &k, &x(2, 20, 7), 20), "Shape", &["v", "7", "8"]);
        refused(layer.forward(&x(6, 1, 9), &x(2, 1, 9), &x(2, 1, 8), 20), "Shape", &["k", "9", "8"]);
        let halves = [&q, &k].map(|t| t.to_dtype(DType::F16).unwrap());
        refused(layer.forward(&halves[0], &halves[1], &halves[1], 20), "DType", &["F16", "F32"]);
        refused(layer.left_padding(&ones(&[2], DType::U32, &device)), "Conflict", &["tokens: padding", "20 tokens"]);
        let mask = |shape: [usize; 4]| ones(&shape, DType::F32, &device);
        for shape in [[2, 6, 20, 39], [2, 6, 19, 40], [3, 6, 20, 40], [2, 2, 20, 40]] {
            refused(layer.forward_masked(&q, &k, &k, 20, &mask(shape)), "Shape", &["mask", "[2, 6, 20, 40]"]);
        }
        // Of the tokens 3 to 29, which are to be clustered, 20 is the first that is not finite.
        let nan = Tensor::full(f32::NAN, k.dims(), &device).unwrap();
        refused(layer.forward(&q, &nan, &k, 20), "NonFinite", &["k: row 20"]);
        assert_eq!((layer.offset(), layer.cache().current_seq_len()), (20, 20));
        layer.forward(&q, &k, &k, 20).unwrap();

        for (options, variant, parts) in [
            (Options { window: Some(0), ..PLAIN }, "Range", ["sliding_window: 0", "1.."]),
            (Options { softcap: Some(0.0), ..PLAIN }, "Value", ["softcap: 0", "above 0"]),
            (Options { softcap: Some(f64::NAN), ..PLAIN }, "Value", ["softcap: NaN", "above 0"]),
            (Options { scale: Some(f64::INFINITY), ..PLAIN }, "Value", ["softmax_scale: inf", "finite"]),
        ] {
            let mut layer = self::layer(cache(), 9, options, &device);
            refused(layer.forward(&q, &k, &k, 0), variant, &parts);
            assert_eq!(layer.cache().current_seq_len(), 0);
        }
        for (options, with) in [
            (Options { window: Some(7), ..PLAIN }, "a window of 7"),
            (Options { padding: Some([1, 0]), ..PLAIN }, "padding"),
        ] {
            let mut layer = self::layer(cache(), 9, options, &device);
            refused(layer.forward_masked(&q, &k, &k, 0, &mask([1, 1, 20, 20])), "Conflict", &["mask", with]);
        }
        let mut layer = self::layer(cache(), 9, Options { padding: Some([1, 0]), ..PLAIN }, &device);
        let three = [&q, &k].map(|t| Tensor::cat(&[t, &t.narrow(0, 0, 1).unwrap()], 0).unwrap());
        refused(layer.forward(&three[0], &three[1], &three[1], 0), "Size", &["k: number of sequences is 3", "2"]);
        layer.reset();
        layer.forward(&three[0], &three[1], &three[1], 0).unwrap();
    }
}
