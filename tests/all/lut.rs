//! Linear layers whose weights are looked up.

use crate::common::*;
use candle_core::{DType, Device, Module, Tensor};
use candle_flash_kmeans::{
    nn::{Granularity, LutConfig, LutLinear, LutWeights},
    testing, Error,
};
use candle_nn::Linear;
use half::f16;
use rand::Rng;
use rand_chacha::ChaCha8Rng;

/// Weights as their documentation says that they are stored, in f64, row by row.
pub fn spec_weights(w: &LutWeights) -> Rows {
    let LutConfig { bits, group_size, levels: granularity, .. } = w.config();
    let codes = w.codes().to_vec2::<u8>().unwrap();
    let (levels, scales) = (w.levels().to_dtype(DType::F64).unwrap(), w.scales().to_dtype(DType::F64).unwrap());
    let (levels, scales) = (levels.to_vec3::<f64>().unwrap(), scales.to_vec2::<f64>().unwrap());
    let code = |o: usize, c: usize| {
        let (block, i, t) = (c / 64, c % 64 / 8, c % 8);
        let bytes = &codes[o][block * 8 * bits..][..8 * bits];
        let number = |at: usize, len: usize| (0..len).map(|b| (bytes[at + b] as usize) << (8 * b)).sum::<usize>();
        match bits {
            2 => number(2 * t, 2) >> (2 * i) & 3,
            3 => (number(2 * t, 2) >> (2 * i) & 3) + 4 * (number(16 + t, 1) >> i & 1),
            _ => number(4 * t, 4) >> (4 * i) & 15,
        }
    };
    let mut weights: Rows = (0..w.outputs())
        .map(|o| {
            let weight = |c: usize| {
                let group = c.checked_div(group_size).unwrap_or(0);
                let table = match granularity {
                    Granularity::Tensor => &levels[0][0],
                    Granularity::Output => &levels[o][0],
                    Granularity::Group => &levels[o][group],
                };
                table[code(o, c)] * scales[o][group]
            };
            (0..w.inputs()).map(weight).collect()
        })
        .collect();
    if let Some((columns, values)) = w.outliers() {
        let values = values.to_dtype(DType::F64).unwrap().to_vec2::<f64>().unwrap();
        for (o, columns) in columns.to_vec2::<u32>().unwrap().iter().enumerate() {
            columns.iter().zip(&values[o]).for_each(|(&c, v)| weights[o][c as usize] += v);
        }
    }
    weights
}

fn configs() -> impl Iterator<Item = LutConfig> {
    use Granularity::{Group, Output, Tensor};
    (2..=4).flat_map(|bits| {
        [
            (0, Output, 0),
            (64, Output, 0),
            (128, Group, 3),
            (64, Group, 0),
            (0, Output, 5),
            (0, Tensor, 0),
            (64, Tensor, 2),
        ]
        .map(|(group_size, levels, outliers)| LutConfig { bits, group_size, levels, outliers, rounds: 0 })
    })
}

fn normal(shape: &[usize], rng: &mut ChaCha8Rng) -> Tensor {
    tensor(shape, DType::F32, |_| (0..6).map(|_| rng.random::<f64>() - 0.5).sum::<f64>() * 0.05)
}

#[test]
fn products_are_those_of_the_stored_weights() {
    let mut rng = rng(1);
    for device in devices() {
        for (i, config) in configs().enumerate() {
            for (outputs, inputs) in [(1, 5), (33, 64), (70, 200), (150, 384), (18, 4300)] {
                let w = normal(&[outputs, inputs], &mut rng);
                let weights = LutWeights::quantize(&w.to_device(&device).unwrap(), None, &config).unwrap();
                let spec = spec_weights(&weights.to_device(&Device::Cpu).unwrap());
                let flat: Vec<f64> = spec.concat();
                // A product of two numbers and an addition are rounded, each to f32.
                let near = 1e-6 * largest(flat.iter().map(|w| w.abs()));
                assert_near(&weights.dequantize().unwrap(), &flat, near, &format!("{config:?}"));
                let rows = [
                    (1, DType::F32),
                    (1, DType::BF16),
                    (1, DType::F16),
                    (3, DType::BF16),
                    (9, DType::F16),
                    (5, DType::F32),
                    (19, DType::BF16),
                    (40, DType::F16),
                    (40, DType::F32),
                    (150, DType::F16),
                    (141, DType::BF16),
                    (133, DType::F32),
                ];
                for (m, dtype) in rows {
                    let x = uniform(&[m, inputs], -1.0, 2.0, dtype, &mut rng);
                    let rows = &problems(&x)[0];
                    let expected: Vec<f64> =
                        rows.iter().flat_map(|x| spec.iter().map(|w| dot(x, w)).collect::<Vec<_>>()).collect();
                    let scale = rows.iter().flat_map(|x| {
                        spec.iter().map(|w| sum(x.iter().zip(w).map(|(x, w)| (x * w).abs()))).collect::<Vec<_>>()
                    });
                    let tolerance = largest(scale) * 1e-6 + ulp(largest(expected.iter().map(|y| y.abs())), dtype);
                    for kernel in [true, false] {
                        if !kernel {
                            testing::force(Some("cpu"));
                        }
                        let product = weights.matmul(&x.to_device(&device).unwrap());
                        testing::force(None);
                        let what = format!("case {i}, {outputs} x {inputs}, {m} rows, {dtype:?}, kernel {kernel}");
                        let product = product.unwrap();
                        assert_eq!((product.dims(), product.dtype()), (&[m, outputs][..], dtype), "{what}");
                        assert_near(&product, &expected, tolerance, &what);
                    }
                }
            }
        }
    }
}

/// What is not finite, or far larger than the rest, is nobody's but its own row's, whatever else the rows are.
#[test]
fn rows_do_not_touch_each_other() {
    let mut rng = rng(11);
    for device in devices() {
        for (bits, dtype) in (2..=4).flat_map(|bits| [DType::F16, DType::BF16, DType::F32].map(|dtype| (bits, dtype))) {
            let config = LutConfig { bits, group_size: 64, outliers: 1, ..LutConfig::default() };
            let w = normal(&[21, 300], &mut rng).to_device(&device).unwrap();
            let weights = LutWeights::quantize(&w, None, &config).unwrap();
            let mut rows = problems(&uniform(&[6, 300], -1.0, 2.0, dtype, &mut rng))[0].clone();
            (rows[1][7], rows[2][299], rows[4][130]) = (f64::INFINITY, f64::NAN, 60000.0);
            rows[5].iter_mut().for_each(|v| *v *= 2f64.powi(-9));
            let x = tensor(&[6, 300], dtype, |i| rows[i / 300][i % 300]).to_device(&device).unwrap();
            let all = weights.matmul(&x).unwrap().to_device(&Device::Cpu).unwrap();
            let spec = spec_weights(&weights.to_device(&Device::Cpu).unwrap());
            for (i, row) in problems(&all)[0].iter().enumerate() {
                let what = format!("{bits} bits, {dtype:?}, row {i}");
                if i == 1 || i == 2 {
                    assert!(row.iter().all(|y| !y.is_finite()), "{what}: {row:?}");
                    continue;
                }
                let own = &problems(&x.to_device(&Device::Cpu).unwrap())[0][i];
                for (y, w) in row.iter().zip(&spec) {
                    let size = sum(own.iter().zip(w).map(|(x, w)| (x * w).abs()));
                    let off = (y - dot(own, w)).abs();
                    assert!(off <= 1e-6 * size + ulp(dot(own, w).abs(), dtype), "{what}: {off} of {size}");
                }
            }
        }
    }
}

/// The least cost of so many clusters of points by their values, tried cut by cut.
fn least_cost(points: &[(f64, f64)], k: usize) -> f64 {
    let cost = |points: &[(f64, f64)]| {
        let total = sum(points.iter().map(|p| p.1));
        let mean = sum(points.iter().map(|p| p.0 * p.1)) / total;
        sum(points.iter().map(|p| (p.0 - mean).powi(2) * p.1))
    };
    let mut least: Vec<f64> = (0..=points.len()).map(|n| if n == 0 { 0.0 } else { f64::INFINITY }).collect();
    for _ in 0..k {
        let before = least.clone();
        for (end, least) in least.iter_mut().enumerate().skip(1) {
            *least = (0..end).map(|begin| before[begin] + cost(&points[begin..end])).fold(*least, f64::min);
        }
    }
    least[points.len()]
}

#[test]
fn levels_are_an_optimum_by_scales_and_importance() {
    let mut rng = rng(2);
    let (outputs, inputs) = (6, 130);
    let w = normal(&[outputs, inputs], &mut rng);
    let importance = uniform(&[inputs], 2.0, 1.9, DType::F32, &mut rng);
    for importance in [None, Some(&importance)] {
        let shared = |config: &LutConfig| config.levels == Granularity::Tensor;
        for config in configs().filter(|config| config.outliers == 0 && !shared(config)) {
            let weights = LutWeights::quantize(&w, importance, &config).unwrap();
            let (spec, exact) = (spec_weights(&weights), &problems(&w)[0]);
            let counts = importance.map_or(vec![1.0; inputs], f64s);
            let scales = weights.scales().to_dtype(DType::F64).unwrap().to_vec2::<f64>().unwrap();
            let group = |c: usize| c.checked_div(config.group_size).unwrap_or(0);
            for o in 0..outputs {
                // A scale is the largest magnitude of its group.
                for (g, scale) in scales[o].iter().enumerate() {
                    let own = largest((0..inputs).filter(|&c| group(c) == g).map(|c| exact[o][c].abs()));
                    assert!((scale - own).abs() <= own * 2f64.powi(-11), "{config:?}: {scale}, {own}");
                }
                let got = sum((0..inputs).map(|c| (exact[o][c] - spec[o][c]).powi(2) * counts[c]));
                let tables = if config.levels == Granularity::Group { scales[o].len() } else { 1 };
                let least = sum((0..tables).map(|t| {
                    let own = (0..inputs).filter(|&c| tables == 1 || group(c) == t);
                    let scaled = own.map(|c| {
                        let scale = scales[o][group(c)];
                        (exact[o][c] / scale, counts[c] * scale * scale)
                    });
                    let mut points: Vec<_> = scaled.collect();
                    points.sort_by(|a, b| a.0.total_cmp(&b.0));
                    least_cost(&points, 1 << config.bits)
                }));
                // Levels are rounded to 11 bits.
                let rounding = sum((0..inputs).map(|c| (exact[o][c] * 2f64.powi(-11)).powi(2) * counts[c]));
                assert!(got <= least * (1.0 + 1e-6) + rounding, "{config:?}, output {o}: {got}, not {least}");
            }
        }
    }
}

/// All weights share levels, which are an optimum but for a histogram of theirs.
#[test]
fn shared_levels_are_nearly_an_optimum() {
    let mut rng = rng(8);
    let (outputs, inputs) = (3, 70);
    let w = normal(&[outputs, inputs], &mut rng);
    let importance = uniform(&[outputs, inputs], 2.0, 1.9, DType::F32, &mut rng);
    let (exact, counts) = (&problems(&w)[0], &problems(&importance)[0]);
    for bits in 2..=4 {
        for group_size in [0, 64] {
            let config = LutConfig { bits, group_size, levels: Granularity::Tensor, ..LutConfig::default() };
            let weights = LutWeights::quantize(&w, Some(&importance), &config).unwrap();
            assert_eq!(weights.levels().dims(), [1, 1, 1 << bits]);
            let spec = spec_weights(&weights);
            let scales = &problems(&weights.scales().to_dtype(DType::F64).unwrap())[0];
            let all = || (0..outputs).flat_map(|o| (0..inputs).map(move |c| (o, c)));
            let mut points: Vec<_> = all()
                .map(|(o, c)| {
                    let scale = scales[o][c.checked_div(group_size).unwrap_or(0)];
                    (exact[o][c] / scale, counts[o][c] * scale * scale)
                })
                .collect();
            points.sort_by(|a, b| a.0.total_cmp(&b.0));
            let got = sum(all().map(|(o, c)| (exact[o][c] - spec[o][c]).powi(2) * counts[o][c]));
            // A value is less than a bin, a part in 16,383 of the range from -1 to 1, from its bin's mean; and levels have 11 bits.
            let off = 2.0 * (2.0 / 16383.0) + 2f64.powi(-11);
            let most = least_cost(&points, 1 << bits).sqrt() + sum(points.iter().map(|p| p.1)).sqrt() * off;
            assert!(got.sqrt() <= most, "{config:?}: {}, not {most}", got.sqrt());
        }
    }
}

#[test]
fn rounds_leave_less_error() {
    let mut rng = rng(9);
    let w = normal(&[8, 256], &mut rng);
    let importance = uniform(&[256], 2.0, 1.9, DType::F32, &mut rng);
    let (exact, counts) = (&problems(&w)[0], f64s(&importance));
    for config in configs() {
        let error = |rounds| {
            let weights = LutWeights::quantize(&w, Some(&importance), &LutConfig { rounds, ..config }).unwrap();
            let spec = spec_weights(&weights);
            let row = |o: usize| sum((0..256).map(|c| (exact[o][c] - spec[o][c]).powi(2) * counts[c]));
            sum((0..8).map(row))
        };
        let errors = [0, 1, 4].map(error);
        // Of one scale an output, or levels of each group, the scale does nothing that levels do not do.
        let scales_matter =
            config.levels == Granularity::Tensor || config.levels == Granularity::Output && config.group_size > 0;
        let most = if scales_matter { 0.999 } else { 1.001 };
        assert!(errors[1] <= most * errors[0] && errors[2] <= 1.001 * errors[1], "{config:?}: {errors:?}");
    }
}

#[test]
fn outliers_are_what_counts_most_and_nearly_exact() {
    let mut rng = rng(3);
    let w = normal(&[4, 100], &mut rng);
    let importance = uniform(&[4, 100], 2.0, 1.9, DType::F32, &mut rng);
    let config = LutConfig { bits: 2, outliers: 7, ..LutConfig::default() };
    let weights = LutWeights::quantize(&w, Some(&importance), &config).unwrap();
    let (spec, exact, counts) = (spec_weights(&weights), &problems(&w)[0], &problems(&importance)[0]);
    let plain =
        spec_weights(&LutWeights::quantize(&w, Some(&importance), &LutConfig { outliers: 0, ..config }).unwrap());
    for o in 0..4 {
        let mut order: Vec<_> = (0..100).collect();
        let cost = |c: usize| exact[o][c].powi(2) * counts[o][c];
        order.sort_by(|&a, &b| cost(b).total_cmp(&cost(a)));
        let mut expected = order[..7].to_vec();
        expected.sort_unstable();
        let columns = weights.outliers().unwrap().0.to_vec2::<u32>().unwrap();
        assert_eq!(columns[o].iter().map(|&c| c as usize).collect::<Vec<_>>(), expected);
        for c in expected {
            // A difference of at most twice the largest magnitude, in 11 bits.
            let off = (spec[o][c] - exact[o][c]).abs();
            assert!(off <= 2.0 * largest(exact[o].iter().map(|w| w.abs())) * 2f64.powi(-11), "{off}");
        }
        let error = |w: &Rows| sum((0..100).map(|c| (w[o][c] - exact[o][c]).powi(2) * counts[o][c]));
        assert!(error(&spec) < 0.8 * error(&plain), "{} {}", error(&spec), error(&plain));
    }
    let all = LutConfig { outliers: 100, ..config };
    assert_near(
        &LutWeights::quantize(&w, None, &all).unwrap().dequantize().unwrap(),
        &exact.concat(),
        largest(exact.concat().iter().map(|w| w.abs())) * 2f64.powi(-11),
        "all are outliers",
    );
}

#[test]
fn importance_that_is_no_number_above_0_is_none() {
    let w = normal(&[3, 80], &mut rng(7));
    let config = LutConfig { bits: 2, outliers: 3, ..LutConfig::default() };
    let quantized = |none: f64| {
        let importance = tensor(&[80], DType::F32, |i| if i % 4 == 1 { none } else { 1.0 + (i % 3) as f64 });
        LutWeights::quantize(&w, Some(&importance), &config).unwrap()
    };
    let zero = quantized(0.0);
    for none in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, -1.0] {
        assert_eq!(spec_weights(&quantized(none)), spec_weights(&zero), "{none}");
    }
    // Weights of the largest magnitudes, on both sides, stay finite.
    let ends = tensor(&[2, 70], DType::F32, |i| if i % 2 == 0 { 65504.0 } else { -65504.0 + i as f64 });
    let all = LutWeights::quantize(&ends, None, &LutConfig { outliers: 70, ..config }).unwrap();
    assert!(spec_weights(&all).concat().iter().all(|w| w.is_finite()));
}

#[test]
fn a_layer_is_a_linear_layer() {
    let mut rng = rng(4);
    for device in devices() {
        let (w, bias) = (normal(&[10, 48], &mut rng), normal(&[10], &mut rng));
        let linear = Linear::new(w.to_device(&device).unwrap(), Some(bias.to_device(&device).unwrap()));
        let layer = LutLinear::quantize(&linear, None, &LutConfig::default()).unwrap();
        let dense = Linear::new(layer.weights().dequantize().unwrap(), linear.bias().cloned());
        let x = uniform(&[2, 3, 48], -1.0, 2.0, DType::F32, &mut rng).to_device(&device).unwrap();
        let expected = dense.forward(&x).unwrap();
        let got = layer.forward(&x).unwrap();
        assert_eq!(got.dims(), [2, 3, 10]);
        assert_near(&got, &f64s(&expected), 1e-5, "batch dimensions");
        for laid in layouts(&x) {
            assert_same(&layer.forward(&laid.view).unwrap(), &got, &laid.name);
        }
        let one = layer.forward(&x.get(0).unwrap().get(0).unwrap()).unwrap();
        assert_eq!(one.dims(), [10]);
        assert_near(&one, &f64s(&expected)[..10], 1e-5, "one row");
        let none = layer.forward(&x.narrow(0, 0, 0).unwrap()).unwrap();
        assert_eq!((none.dims(), none.dtype()), (&[0, 3, 10][..], DType::F32));
        assert_eq!(layer.weights().bits_per_weight(), (32.0 * 8.0 + 16.0 * 16.0 + 16.0) / 48.0);
    }
}

#[test]
fn a_file_holds_a_layer() {
    let (folder, mut rng) = (Folder::new("lut"), rng(5));
    for (i, config) in configs().enumerate() {
        let (path, again) = (folder.0.join("layer.safetensors"), folder.0.join("again.safetensors"));
        let bias = normal(&[9], &mut rng);
        let bias = (i % 2 == 0).then_some(&bias);
        let weights = LutWeights::quantize(&normal(&[9, 150], &mut rng), None, &config).unwrap();
        let layer = LutLinear::new(weights, bias).unwrap();
        layer.save(&path).unwrap();
        let loaded = LutLinear::load(&path, &Device::Cpu).unwrap();
        assert_eq!((loaded.weights().config(), loaded.weights().inputs()), (config, 150));
        let x = uniform(&[3, 150], -1.0, 2.0, DType::F32, &mut rng);
        assert_same(&loaded.forward(&x).unwrap(), &layer.forward(&x).unwrap(), "loaded");
        loaded.save(&again).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        assert_eq!(bytes, std::fs::read(&again).unwrap());

        // Other sizes than those of its tensors, and columns that are out of range.
        let header = String::from_utf8_lossy(&bytes).into_owned();
        for (from, to) in [("\"inputs\":\"150\"", "\"inputs\":\"950\""), ("\"bits\":\"", "\"bits\":\"9")] {
            let at = header.find(from).unwrap();
            let mut damaged = bytes.clone();
            damaged[at..at + to.len()].copy_from_slice(to.as_bytes());
            std::fs::write(&path, &damaged).unwrap();
            let error = LutLinear::load(&path, &Device::Cpu).unwrap_err();
            assert!(matches!(error, Error::Format { .. }), "{error}");
        }
        // Numbers that are none.
        let data = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        for name in ["levels", "scales"] {
            let own = header.split_once(&format!("\"{name}\":{{")).unwrap().1;
            let offset = own.split_once("\"data_offsets\":[").unwrap().1.split_once(',').unwrap().0;
            let at = data + offset.parse::<usize>().unwrap();
            for value in [f16::NAN, f16::INFINITY] {
                let mut damaged = bytes.clone();
                damaged[at..at + 2].copy_from_slice(&value.to_le_bytes());
                std::fs::write(&path, &damaged).unwrap();
                let error = LutLinear::load(&path, &Device::Cpu).unwrap_err();
                assert!(matches!(error, Error::Format { .. }), "{name}, {value}: {error}");
            }
        }
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let mut rng = rng(6);
    let w = normal(&[4, 70], &mut rng);
    let quantize = |w: &Tensor, importance: Option<&Tensor>, config| LutWeights::quantize(w, importance, &config);
    let default = LutConfig::default();
    let refused = |result: Result<LutWeights, Error>, message: &str| {
        assert_eq!(result.unwrap_err().to_string(), message);
    };
    refused(quantize(&w, None, LutConfig { bits: 5, ..default }), "bits: 5 is outside 2..=4");
    refused(
        quantize(&w, None, LutConfig { group_size: 32, ..default }),
        "group_size: 32 cannot be combined with codes of 64 columns that lie together",
    );
    refused(
        quantize(&w, None, LutConfig { group_size: 1 << 63, levels: Granularity::Tensor, ..default }),
        "group_size: 9223372036854775808 is outside 0..=4294967295",
    );
    refused(quantize(&w, None, LutConfig { outliers: 71, ..default }), "outliers: 71 is outside 0..=70");
    refused(quantize(&w, Some(&w.narrow(1, 0, 7).unwrap()), default), "importance: shape [4, 7], expected [70]");
    refused(quantize(&w.get(0).unwrap(), None, default), "weight: number of dimensions is 1, expected 2");
    refused(quantize(&w.narrow(0, 0, 0).unwrap(), None, default), "weight elements: 0 is outside 1..");
    let bad = (&w * f64::NAN).unwrap();
    refused(quantize(&bad, None, default), "weight: row 0 of batch element 0 holds a NaN or an infinity");
    let large = w.affine(0.0, 1e5).unwrap();
    refused(quantize(&large, None, default), "weight: 100000 is not within 65504, as f16 is");

    let weights = quantize(&w, None, default).unwrap();
    let error = weights.matmul(&w.narrow(1, 0, 7).unwrap()).unwrap_err();
    assert_eq!(error.to_string(), "x: columns is 7, expected 70");
    let error = weights.matmul(&w.to_dtype(DType::F64).unwrap()).unwrap_err();
    assert_eq!(error.to_string(), "x: dtype F64, expected F16, BF16 or F32");
    let error = LutLinear::new(weights, Some(&w.narrow(1, 0, 1).unwrap().squeeze(1).unwrap().narrow(0, 0, 3).unwrap()));
    assert_eq!(error.unwrap_err().to_string(), "bias: shape [3], expected [4]");
}
