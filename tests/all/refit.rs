//! Entries of a residual quantiser by least squares, against plain elimination.

use crate::common::*;
use candle_core::{DType, Device, Tensor};
use candle_flash_kmeans::{
    nn::{Codebook, ResidualQuantizer},
    Error, KMeans, Metric,
};
use rand::Rng;

fn stages(batch: &[usize], sizes: &[usize], d: usize, dtype: DType, device: &Device) -> ResidualQuantizer {
    let stages = sizes.iter().enumerate().map(|(i, &k)| {
        let entries = uniform(&[batch, &[k, d]].concat(), 1.0, 2.0, dtype, &mut rng(20 + i as u64));
        Codebook::new(&entries.to_device(device).unwrap(), Metric::SquaredEuclidean).unwrap()
    });
    ResidualQuantizer::new(stages.collect()).unwrap()
}

/// Codes of each stage, at random.
fn codes(shape: &[usize], sizes: &[usize], seed: u64) -> Tensor {
    let mut rng = rng(seed);
    let count = shape.iter().product::<usize>();
    let codes: Vec<u32> =
        (0..count).flat_map(|_| sizes.iter().map(|&k| rng.random_range(0..k as u32)).collect::<Vec<_>>()).collect();
    Tensor::from_vec(codes, [shape, &[sizes.len()]].concat(), &Device::Cpu).unwrap()
}

/// The weighted squares that are left over.
fn left_over(rq: &ResidualQuantizer, x: &Tensor, codes: &Tensor, weights: &[f64]) -> f64 {
    let rest = (x.to_dtype(DType::F64).unwrap() - rq.decode(codes).unwrap().to_dtype(DType::F64).unwrap()).unwrap();
    let d = x.dims()[x.rank() - 1];
    sum(f64s(&rest).chunks(d).zip(weights).map(|(row, w)| w * dot(row, row)))
}

/// Solves `a x = b` by elimination.
fn eliminate(mut a: Rows, mut b: Vec<f64>) -> Vec<f64> {
    let n = b.len();
    for i in 0..n {
        let pivot = (i..n).max_by(|&p, &q| a[p][i].abs().total_cmp(&a[q][i].abs())).unwrap();
        a.swap(i, pivot);
        b.swap(i, pivot);
        for row in i + 1..n {
            let factor = a[row][i] / a[i][i];
            let taken = a[i].clone();
            a[row].iter_mut().zip(taken).for_each(|(value, taken)| *value -= factor * taken);
            b[row] -= factor * b[i];
        }
    }
    for i in (0..n).rev() {
        b[i] = (b[i] - sum((i + 1..n).map(|c| a[i][c] * b[c]))) / a[i][i];
    }
    b
}

/// What rows become by least squares. The first entry of every stage but one is zero: the others can say the same.
fn least_squares(x: &Rows, codes: &[Vec<u32>], weights: &[f64], sizes: &[usize]) -> Rows {
    let first = |stage: usize| sizes[..stage].iter().sum::<usize>() - stage.saturating_sub(1);
    let unknown = |stage: usize, code: u32| match (stage, code) {
        (0, _) => Some(code as usize),
        (_, 0) => None,
        _ => Some(first(stage) + code as usize - 1),
    };
    let named: Vec<Vec<usize>> = codes
        .iter()
        .map(|codes| codes.iter().enumerate().filter_map(|(s, &code)| unknown(s, code)).collect())
        .collect();
    let all = sizes.iter().sum::<usize>() - (sizes.len() - 1);
    let mut found = vec![vec![0.0; x[0].len()]; x.len()];
    for c in 0..x[0].len() {
        let (mut a, mut b) = (vec![vec![0.0; all]; all], vec![0.0; all]);
        for ((row, named), w) in x.iter().zip(&named).zip(weights) {
            for &p in named {
                named.iter().for_each(|&q| a[p][q] += w);
                b[p] += w * row[c];
            }
        }
        let entries = eliminate(a, b);
        found.iter_mut().zip(&named).for_each(|(row, named)| row[c] = named.iter().map(|&p| entries[p]).sum());
    }
    found
}

#[test]
fn entries_are_those_of_least_squares() {
    for device in devices() {
        for (dtype, batch, own) in
            [(DType::F64, vec![], false), (DType::F32, vec![2], true), (DType::F64, vec![2], false)]
        {
            let sizes = [4, 3, 2];
            let shape = [&batch[..], &[90]].concat();
            let x = uniform(&[&shape[..], &[3]].concat(), 1.0, 2.0, dtype, &mut rng(1));
            let rq = stages(if own { &batch } else { &[] }, &sizes, 3, dtype, &device);
            let codes = codes(&shape, &sizes, 2);
            let w = uniform(&shape, 2.0, 1.9, DType::F32, &mut rng(3));
            for weights in [None, Some(&w)] {
                let on = |t: &Tensor| t.to_device(&device).unwrap();
                let found = rq.refit(&on(&x), &on(&codes), weights.map(on).as_ref()).unwrap();
                assert_eq!(found.stages()[0].centroids().dims(), rq.stages()[0].centroids().dims());
                let counts = weights.map_or(vec![1.0; shape.iter().product()], f64s);
                let rows: Vec<Rows> = if own { problems(&x) } else { vec![problems(&x).concat()] };
                let flat: Vec<Vec<u32>> = u32s(&codes).chunks(3).map(<[u32]>::to_vec).collect();
                let each = flat.len() / rows.len();
                let expected = rows.iter().enumerate().flat_map(|(b, x)| {
                    let own = b * each..(b + 1) * each;
                    least_squares(x, &flat[own.clone()], &counts[own], &sizes)
                });
                let expected: Vec<f64> = expected.flatten().collect();
                // A millionth of the weight of an entry holds each where it was.
                assert_near(&found.decode(&on(&codes)).unwrap(), &expected, 1e-5, &format!("{dtype:?}, {own}"));
            }
        }
    }
}

#[test]
fn less_is_left_over_whatever_the_codes() {
    for device in devices() {
        let sizes = [16, 16, 5];
        let x = uniform(&[400, 4], 0.0, 1.0, DType::F32, &mut rng(4)).to_device(&device).unwrap();
        for (case, codes) in [codes(&[400], &sizes, 5), codes(&[400], &[2, 1, 1], 6)].iter().enumerate() {
            let codes = codes.to_device(&device).unwrap();
            let rq = stages(&[], &sizes, 4, DType::F32, &device);
            let better = rq.refit(&x, &codes, None).unwrap();
            let again = better.refit(&x, &codes, None).unwrap();
            let lost = [&rq, &better, &again].map(|rq| left_over(rq, &x, &codes, &[1.0; 400]));
            assert!(lost[1] < 0.5 * lost[0] && lost[2] <= lost[1] * (1.0 + 1e-6), "case {case}: {lost:?}");
            // Entries that no code names stay.
            let [before, after] = [&rq, &better].map(|rq| rq.stages()[2].centroids().narrow(0, 1, 4).unwrap());
            assert_eq!(bits(&before) == bits(&after), case == 1);
        }
        // In turns with a search it trains.
        let mut rq = ResidualQuantizer::train(&x, 3, &KMeans::new(16)).unwrap();
        let mut lost = vec![];
        for _ in 0..4 {
            let codes = rq.encode_beam(&x, 8).unwrap();
            lost.push(left_over(&rq, &x, &codes, &[1.0; 400]));
            rq = rq.refit(&x, &codes, None).unwrap();
        }
        assert!(lost[3] < 0.9 * lost[0] && lost.is_sorted_by(|a, b| a > b), "{lost:?}");
    }
}

#[test]
fn rows_that_do_not_count_change_nothing() {
    let (sizes, x) = ([3, 4], uniform(&[50, 2], 0.0, 1.0, DType::F32, &mut rng(7)));
    let (rq, codes) = (stages(&[], &sizes, 2, DType::F32, &Device::Cpu), codes(&[60], &sizes, 8));
    let expected = rq.refit(&x, &codes.narrow(0, 0, 50).unwrap(), None).unwrap();
    for none in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        let weights = tensor(&[60], DType::F32, |i| if i < 50 { 1.0 } else { none });
        let more = Tensor::cat(&[&x, &x.narrow(0, 0, 10).unwrap()], 0).unwrap();
        let got = rq.refit(&more, &codes, Some(&weights)).unwrap();
        let nan = Tensor::cat(&[&x, &(x.narrow(0, 0, 10).unwrap() * f64::NAN).unwrap()], 0).unwrap();
        let of_nan = rq.refit(&nan, &codes, None).unwrap();
        for (stage, expected) in expected.stages().iter().enumerate() {
            assert_same(got.stages()[stage].centroids(), expected.centroids(), "no weight");
            assert_same(of_nan.stages()[stage].centroids(), expected.centroids(), "not finite");
        }
    }
    // Only shares of weights count, however large these are.
    let huge = Tensor::full(1e308, 50, &Device::Cpu).unwrap();
    let of_huge = rq.refit(&x, &codes.narrow(0, 0, 50).unwrap(), Some(&huge)).unwrap();
    for (stage, expected) in expected.stages().iter().enumerate() {
        assert_near(of_huge.stages()[stage].centroids(), &f64s(expected.centroids()), 1e-6, "huge weights");
    }
    let all =
        rq.refit(&x, &codes.narrow(0, 0, 50).unwrap(), Some(&Tensor::zeros(50, DType::F32, &Device::Cpu).unwrap()));
    assert_same(all.unwrap().stages()[1].centroids(), rq.stages()[1].centroids(), "nothing counts");
}

#[test]
fn what_does_not_fit_is_refused() {
    let (sizes, x) = ([3, 4], uniform(&[50, 2], 0.0, 1.0, DType::F32, &mut rng(9)));
    let (rq, codes) = (stages(&[], &sizes, 2, DType::F32, &Device::Cpu), codes(&[50], &sizes, 10));
    let refused = |result: Result<ResidualQuantizer, Error>, message: &str| {
        assert_eq!(result.unwrap_err().to_string(), message);
    };
    let few = codes.narrow(0, 0, 49).unwrap();
    refused(rq.refit(&x, &few, None), "codes: shape [49, 2], expected [50, 2]");
    refused(rq.refit(&x, &codes.narrow(1, 0, 1).unwrap(), None), "codes: columns is 1, expected 2");
    refused(rq.refit(&x.narrow(1, 0, 1).unwrap(), &codes, None), "x: columns is 1, expected 2");
    let weights = Tensor::ones(49, DType::F32, &Device::Cpu).unwrap();
    refused(rq.refit(&x, &codes, Some(&weights)), "weights: shape [49], expected [50]");
    let high = codes.affine(1.0, 2.0).unwrap();
    assert!(matches!(rq.refit(&x, &high, None), Err(Error::Range { argument: "codes", min: 0, .. })));
    assert!(rq.refit(&x.to_dtype(DType::F64).unwrap(), &codes, None).is_err());
    let cosine = Codebook::new(rq.stages()[0].centroids(), Metric::Cosine).unwrap();
    let error =
        ResidualQuantizer::new(vec![cosine]).unwrap().refit(&x, &codes.narrow(1, 0, 1).unwrap(), None).unwrap_err();
    assert!(matches!(error, Error::Conflict { argument: "metric", .. }), "{error}");
    let none = rq.refit(&x.narrow(0, 0, 0).unwrap(), &codes.narrow(0, 0, 0).unwrap(), None).unwrap();
    assert_same(none.stages()[0].centroids(), rq.stages()[0].centroids(), "no rows");
}
