//! Codes that make up for each other's errors.

use crate::{common::*, lut::spec_weights};
use candle_core::{DType, Device, Tensor};
use candle_flash_kmeans::{
    nn::{Granularity, LutConfig, LutLinear, LutWeights},
    Error,
};
use candle_nn::Linear;

/// Weights, and rows of columns that say much the same.
fn layer(outputs: usize, inputs: usize, seed: u64) -> (Tensor, Tensor) {
    let mut rng = rng(seed);
    let weight = uniform(&[outputs, inputs], 0.5, 0.1, DType::F32, &mut rng);
    let common = uniform(&[3 * inputs, 1], 0.5, 2.0, DType::F32, &mut rng);
    let sizes = uniform(&[1, inputs], 2.0, 1.9, DType::F32, &mut rng);
    let own = uniform(&[3 * inputs, inputs], 0.5, 2.0, DType::F32, &mut rng);
    (weight, own.broadcast_add(&common).unwrap().broadcast_mul(&sizes).unwrap())
}

fn second_moments(x: &Tensor) -> Tensor {
    x.t().unwrap().matmul(x).unwrap()
}

/// The second moments as they are documented to be damped, rounded to f32 as the layer has them.
fn damped(hessian: &Tensor) -> Rows {
    let mut h = problems(hessian)[0].clone();
    let n = h.len();
    let more = 0.01 * sum((0..n).map(|c| h[c][c])) / n as f64;
    h.iter_mut().enumerate().for_each(|(c, row)| row[c] = f64::from(row[c] as f32 + more as f32));
    (0..n).map(|i| (0..n).map(|j| h[i.max(j)][i.min(j)]).collect()).collect()
}

/// The square of the products' errors, added up.
fn lost(weight: &Tensor, h: &Rows, w: &LutWeights) -> f64 {
    let (exact, found) = (&problems(weight)[0], spec_weights(w));
    sum(exact.iter().zip(&found).map(|(exact, found)| {
        let e: Vec<f64> = exact.iter().zip(found).map(|(a, b)| a - b).collect();
        sum(h.iter().zip(&e).map(|(row, v)| v * dot(row, &e)))
    }))
}

fn cholesky(a: &Rows) -> Rows {
    let n = a.len();
    let mut l = vec![vec![0.0; n]; n];
    for i in 0..n {
        for j in 0..=i {
            let rest = a[i][j] - sum((0..j).map(|k| l[i][k] * l[j][k]));
            l[i][j] = if i == j { rest.sqrt() } else { rest / l[j][j] };
        }
    }
    l
}

/// Babai's nearest plane and a pass of coordinate descent, with the values that each column may have.
fn spec(weight: &[f64], values: &[Vec<f64>], h: &Rows) -> Vec<f64> {
    let n = weight.len();
    let nearest =
        |c: usize, v: f64| *values[c].iter().min_by(|a, b| (*a - v).abs().total_cmp(&(*b - v).abs())).unwrap();
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by(|&a, &b| h[b][b].total_cmp(&h[a][a]));
    // As they come: the factor wants the first one last.
    let last_first: Vec<usize> = order.iter().rev().copied().collect();
    let l = cholesky(&last_first.iter().map(|&i| last_first.iter().map(|&j| h[i][j]).collect()).collect());
    let (mut found, mut errors) = (vec![0.0; n], vec![0.0; n]);
    for place in (0..n).rev() {
        let c = last_first[place];
        let fed = sum((place + 1..n).map(|i| errors[i] * l[i][place])) / l[place][place];
        found[c] = nearest(c, weight[c] + fed);
        errors[place] = weight[c] - found[c];
    }
    for &c in &order {
        let slope = sum((0..n).map(|i| h[c][i] * (weight[i] - found[i])));
        found[c] = nearest(c, found[c] + slope / h[c][c]);
    }
    found
}

#[test]
fn codes_are_those_of_the_nearest_plane() {
    let (weight, x) = layer(7, 150, 1);
    let (hessian, exact) = (second_moments(&x), &problems(&weight)[0]);
    let h = damped(&hessian);
    let importance = tensor(&[150], DType::F32, |c| h[c][c]);
    for bits in 2..=4 {
        for (group_size, levels) in [(0, Granularity::Output), (64, Granularity::Tensor), (64, Granularity::Group)] {
            let config = LutConfig { bits, group_size, levels, ..LutConfig::default() };
            let found = LutWeights::quantize_calibrated(&weight, &hessian, &config).unwrap();
            let start = LutWeights::quantize(&weight, Some(&importance), &config).unwrap();
            assert_same(found.levels(), start.levels(), "levels");
            assert_same(found.scales(), start.scales(), "scales");
            let levels = problems(&found.levels().to_dtype(DType::F64).unwrap());
            let scales = &problems(&found.scales().to_dtype(DType::F64).unwrap())[0];
            for (o, got) in spec_weights(&found).iter().enumerate() {
                let values = (0..150usize).map(|c| {
                    let group = c.checked_div(group_size).unwrap_or(0);
                    let table = match config.levels {
                        Granularity::Tensor => &levels[0][0],
                        Granularity::Output => &levels[o][0],
                        Granularity::Group => &levels[o][group],
                    };
                    table.iter().map(|level| level * scales[o][group]).collect()
                });
                let expected = spec(&exact[o], &values.collect::<Vec<_>>(), &h);
                assert_eq!(got, &expected, "{config:?}, output {o}");
            }
        }
    }
}

#[test]
fn each_round_loses_no_more() {
    let (weight, x) = layer(12, 200, 2);
    let hessian = second_moments(&x);
    let h = damped(&hessian);
    let importance = tensor(&[200], DType::F32, |c| h[c][c]);
    for bits in 2..=4 {
        for (group_size, levels, outliers) in [
            (0, Granularity::Output, 0),
            (64, Granularity::Output, 3),
            (64, Granularity::Tensor, 0),
            (128, Granularity::Group, 0),
        ] {
            let config = LutConfig { bits, group_size, levels, outliers, rounds: 0 };
            let alone = lost(&weight, &h, &LutWeights::quantize(&weight, Some(&importance), &config).unwrap());
            let calibrated = |rounds| {
                let config = LutConfig { rounds, ..config };
                LutWeights::quantize_calibrated(&weight, &hessian, &config).unwrap()
            };
            let start = lost(&weight, &h, &calibrated(0));
            assert!(start < 0.9 * alone, "{config:?}: {start}, by importance {alone}");
            let done = lost(&weight, &h, &calibrated(3));
            assert!(done < start, "{config:?}: {done} after rounds, {start} before");
            let levels = calibrated(3).levels().to_dtype(DType::F64).unwrap().flatten_all().unwrap();
            assert!(f64s(&levels).chunks(1 << bits).all(|levels| levels.is_sorted()), "{config:?}");
        }
    }
}

#[test]
fn columns_that_a_calibration_does_not_know_are_rounded() {
    let (weight, x) = layer(5, 70, 3);
    let mask = tensor(&[70], DType::F32, |c| (c % 7 > 0) as usize as f64);
    let hessian = second_moments(&x.broadcast_mul(&mask).unwrap());
    let found = spec_weights(&LutWeights::quantize_calibrated(&weight, &hessian, &LutConfig::default()).unwrap());
    let exact = &problems(&weight)[0];
    for (exact, found) in exact.iter().zip(&found) {
        for c in (0..70).step_by(7) {
            let nearest = found.iter().map(|v| (v - exact[c]).abs()).fold(f64::INFINITY, f64::min);
            assert!((found[c] - exact[c]).abs() <= nearest + 1e-9, "column {c}");
        }
    }
    // A layer that reads nothing, and one of one column.
    let none = Tensor::zeros((70, 70), DType::F32, &Device::Cpu).unwrap();
    let even = LutWeights::quantize(&weight, None, &LutConfig::default()).unwrap();
    let of_none = LutWeights::quantize_calibrated(&weight, &none, &LutConfig::default()).unwrap();
    assert_eq!(spec_weights(&of_none), spec_weights(&even));
    let column = weight.narrow(1, 0, 1).unwrap();
    let one = LutWeights::quantize_calibrated(
        &column,
        &Tensor::ones((1, 1), DType::F32, &Device::Cpu).unwrap(),
        &LutConfig::default(),
    );
    let near = largest(f64s(&column).iter().map(|w| w.abs())) * 2f64.powi(-10);
    assert_near(&one.unwrap().dequantize().unwrap(), &f64s(&column), near, "one column");
}

#[test]
fn a_layer_is_calibrated_and_what_does_not_fit_is_refused() {
    let (weight, x) = layer(5, 70, 4);
    let hessian = second_moments(&x);
    let bias = weight.narrow(1, 0, 1).unwrap().squeeze(1).unwrap();
    let linear = Linear::new(weight.clone(), Some(bias.clone()));
    let layer = LutLinear::quantize_calibrated(&linear, &hessian, &LutConfig::default()).unwrap();
    assert_same(layer.bias().unwrap(), &bias, "bias");
    let alone = LutWeights::quantize_calibrated(&weight, &hessian, &LutConfig::default()).unwrap();
    assert_same(layer.weights().codes(), alone.codes(), "weights");

    let refused = |hessian: &Tensor, message: &str| {
        let error = LutWeights::quantize_calibrated(&weight, hessian, &LutConfig::default()).unwrap_err();
        assert_eq!(error.to_string(), message);
    };
    refused(&hessian.narrow(0, 0, 5).unwrap(), "hessian: shape [5, 70], expected [70, 70]");
    refused(&(&hessian * f64::NAN).unwrap(), "hessian: row 0 of batch element 0 holds a NaN or an infinity");
    refused(&hessian.to_dtype(DType::U32).unwrap(), "hessian: dtype U32, expected F16, BF16, F32 or F64");
    let error = LutWeights::quantize_calibrated(&weight, &hessian.neg().unwrap(), &LutConfig::default()).unwrap_err();
    assert!(matches!(error, Error::Value { argument: "hessian", .. }), "{error}");
}
