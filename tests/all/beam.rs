//! Beam search over the stages of a residual quantiser, against plain loops.

use crate::common::*;
use candle_core::{DType, Device, Tensor};
use candle_flash_kmeans::{
    nn::{Codebook, ResidualQuantizer},
    Error, KMeans, Metric,
};

/// Small whole numbers: what stages leave over is exact in every type, and many choices are equally good.
fn whole(shape: &[usize], limit: i64, seed: u64, dtype: DType, device: &Device) -> Tensor {
    integers(shape, limit, dtype, &mut rng(seed)).to_device(device).unwrap()
}

fn stages(batch: &[usize], sizes: &[usize], d: usize, dtype: DType, device: &Device) -> ResidualQuantizer {
    let stages = sizes.iter().enumerate().map(|(i, &k)| {
        let entries = whole(&[batch, &[k, d]].concat(), 5, 20 + i as u64, dtype, device);
        Codebook::new(&entries, Metric::SquaredEuclidean).unwrap()
    });
    ResidualQuantizer::new(stages.collect()).unwrap()
}

/// The best of the choices that are kept, by extending each with every entry.
fn spec(row: &[f64], stages: &[Rows], width: usize) -> Vec<u32> {
    let mut beam = vec![(vec![], row.to_vec())];
    for entries in stages {
        let mut all: Vec<(f64, Vec<u32>, Vec<f64>)> = vec![];
        for (codes, left) in &beam {
            for (j, entry) in entries.iter().enumerate() {
                let left: Vec<f64> = left.iter().zip(entry).map(|(l, e)| l - e).collect();
                let codes = [&codes[..], &[j as u32]].concat();
                all.push((left.iter().map(|v| v * v).sum(), codes, left));
            }
        }
        // Stable: of equal ones the choice that was better before comes first, then the lower entry.
        all.sort_by(|a, b| a.0.total_cmp(&b.0));
        beam = all.into_iter().take(width).map(|(_, codes, left)| (codes, left)).collect();
    }
    beam.swap_remove(0).0
}

#[test]
fn the_best_choices_are_kept_after_each_stage() {
    for device in devices() {
        for (dtype, batch, own) in
            [(DType::F32, vec![], false), (DType::F16, vec![2], true), (DType::F64, vec![2], false)]
        {
            let x = whole(&[&batch[..], &[40, 4]].concat(), 9, 1, dtype, &device);
            let rq = stages(if own { &batch } else { &[] }, &[6, 9, 3, 5], 4, dtype, &device);
            let entries: Vec<Vec<Rows>> = rq.stages().iter().map(|stage| problems(stage.centroids())).collect();
            for width in [1, 2, 5, 64] {
                let codes = rq.encode_beam(&x, width).unwrap();
                assert_eq!((codes.dims(), codes.dtype()), (&[&batch[..], &[40, 4]].concat()[..], DType::U32));
                let mut expected = vec![];
                for (b, rows) in problems(&x).iter().enumerate() {
                    let own: Vec<Rows> = entries.iter().map(|e| e[if e.len() == 1 { 0 } else { b }].clone()).collect();
                    expected.extend(rows.iter().flat_map(|row| spec(row, &own, width)));
                }
                assert_eq!(u32s(&codes), expected, "width {width}, {dtype:?}");
            }
            assert_same(&rq.encode_beam(&x, 1).unwrap(), &rq.encode(&x).unwrap(), "width 1");
        }
    }
}

#[test]
fn a_wider_beam_leaves_less_over() {
    for device in devices() {
        let x = uniform(&[3, 400, 8], 0.0, 1.0, DType::F32, &mut rng(2)).to_device(&device).unwrap();
        let rq = ResidualQuantizer::train(&x, 4, &KMeans::new(16)).unwrap();
        let left = |codes: &Tensor| {
            let rest = (&x - rq.decode(codes).unwrap()).unwrap();
            f64s(&rest).iter().map(|v| v * v).sum::<f64>()
        };
        let greedy = rq.encode(&x).unwrap();
        assert_same(&rq.encode_beam(&x, 1).unwrap(), &greedy, "rounded rows too");
        let lost: Vec<f64> = [1, 4, 16].iter().map(|&width| left(&rq.encode_beam(&x, width).unwrap())).collect();
        assert!(lost[1] < 0.95 * lost[0] && lost[2] < lost[1], "{lost:?}");
    }
}

#[test]
fn rows_are_met_in_blocks() {
    // More rows than are met at once, which are the same rows again and again.
    let few = uniform(&[1, 16, 2], 0.0, 1.0, DType::F32, &mut rng(3));
    let rq = ResidualQuantizer::train(&few, 2, &KMeans::new(3)).unwrap();
    let many = few.repeat((1, 80, 1)).unwrap();
    let codes = rq.encode_beam(&many, 64).unwrap();
    let expected = rq.encode_beam(&few, 64).unwrap().repeat((1, 80, 1)).unwrap();
    assert_same(&codes, &expected, "in blocks");
}

#[test]
fn what_no_beam_takes_is_refused() {
    let x = ones(&[3, 4], DType::F32, &Device::Cpu);
    let rq = stages(&[], &[6, 9], 4, DType::F32, &Device::Cpu);
    for width in [0, 65] {
        let error = rq.encode_beam(&x, width).unwrap_err();
        assert!(matches!(error, Error::Range { argument: "width", min: 1, max: 64, .. }), "{error}");
    }
    let cosine = Codebook::new(rq.stages()[0].centroids(), Metric::Cosine).unwrap();
    let error = ResidualQuantizer::new(vec![cosine]).unwrap().encode_beam(&x, 2).unwrap_err();
    assert!(matches!(error, Error::Conflict { argument: "metric", .. }), "{error}");
    assert!(rq.encode_beam(&x.narrow(1, 0, 3).unwrap().contiguous().unwrap(), 2).is_err());
    assert!(rq.encode_beam(&x.get(0).unwrap(), 2).is_err());
    assert_eq!(rq.encode_beam(&x.narrow(0, 0, 0).unwrap(), 2).unwrap().dims(), [0, 2]);
    // A NaN is far from everything, and gets some code in range.
    let nan = Tensor::full(f32::NAN, (2, 4), &Device::Cpu).unwrap();
    assert!(u32s(&rq.encode_beam(&nan, 3).unwrap()).iter().all(|&code| code < 9));
}
