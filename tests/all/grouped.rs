//! Residual quantisers of groups of columns, against those of each group alone.

use crate::common::*;
use candle_core::{DType, Device, Module, Tensor};
use candle_flash_kmeans::{
    nn::{Codebook, GroupedResidualQuantizer, ResidualQuantizer},
    Error, Init, KMeans, Metric,
};

fn rows(shape: &[usize], dtype: DType, device: &Device) -> Tensor {
    uniform(shape, 0.0, 1.0, dtype, &mut rng(1)).to_device(device).unwrap()
}

/// The columns of a group of three.
fn group(x: &Tensor, g: usize) -> Tensor {
    x.narrow(x.rank() - 1, 3 * g, 3).unwrap().contiguous().unwrap()
}

#[test]
fn each_group_is_a_residual_quantiser() {
    let folder = Folder::new("grouped");
    for device in devices() {
        for (dtype, batch) in [(DType::F32, vec![]), (DType::F16, vec![2]), (DType::F64, vec![2])] {
            let x = rows(&[&batch[..], &[70, 6]].concat(), dtype, &device);
            let weights = tensor(&[70], DType::F64, |i| (i % 3) as f64).to_device(&device).unwrap();
            let kmeans = KMeans::new(8).init(Init::Even).sample_weights(&weights);
            let grouped = GroupedResidualQuantizer::train(&x, 2, 3, &kmeans).unwrap();
            assert_eq!((grouped.groups(), grouped.d(), grouped.residual().stages().len()), (2, 6, 3));
            let (codes, values) = (grouped.encode(&x).unwrap(), grouped.forward(&x).unwrap());
            let beam = grouped.encode_beam(&x, 4).unwrap();
            assert_eq!(codes.dims(), [&batch[..], &[70, 2, 3]].concat());
            for g in 0..2 {
                let own = group(&x, g);
                let alone = ResidualQuantizer::train(&own, 3, &kmeans).unwrap();
                let of_group = |codes: &Tensor| codes.narrow(codes.rank() - 2, g, 1).unwrap().squeeze(codes.rank() - 2);
                assert_same(&of_group(&codes).unwrap(), &alone.encode(&own).unwrap(), "codes");
                assert_same(&of_group(&beam).unwrap(), &alone.encode_beam(&own, 4).unwrap(), "codes of a beam");
                assert_same(&group(&values, g), &alone.forward(&own).unwrap(), "values");
                let first = grouped.decode(&codes.narrow(codes.rank() - 1, 0, 2).unwrap()).unwrap();
                let expected =
                    alone.decode(&alone.encode(&own).unwrap().narrow(codes.rank() - 2, 0, 2).unwrap()).unwrap();
                assert_same(&group(&first, g), &expected, "of the first stages");
            }
            assert_same(&grouped.decode(&grouped.encode_u8(&x).unwrap()).unwrap(), &values, "of bytes");
            assert_eq!(grouped.bits_per_value(), 3.0 * 3.0 / 3.0);
            let stored = 3.0 * 8.0 * dtype.size_in_bytes() as f64 * 8.0 / 70.0;
            approx::assert_relative_eq!(grouped.bits_per_value_with_codebook(70), 3.0 + stored, epsilon = 1e-12);

            let path = folder.0.join("grouped.safetensors");
            grouped.save(&path).unwrap();
            let loaded = GroupedResidualQuantizer::load(&path, &device).unwrap();
            assert_same(&loaded.encode(&x).unwrap(), &codes, "loaded");
            assert!(ResidualQuantizer::load(&path, &device).is_err());
        }
    }
}

#[test]
fn stages_of_no_batch_serve_any() {
    for device in devices() {
        let x = rows(&[2, 3, 40, 6], DType::F32, &device);
        let first = x.get(0).unwrap().get(0).unwrap();
        let grouped = GroupedResidualQuantizer::train(&first, 2, 2, &KMeans::new(4)).unwrap();
        let (codes, values) = (grouped.encode(&x).unwrap(), grouped.forward(&x).unwrap());
        assert_eq!(codes.dims(), [2, 3, 40, 2, 2]);
        assert_same(&grouped.decode(&codes).unwrap(), &values, "decoded");
        for (a, b) in [(0, 0), (1, 2)] {
            let of = |t: &Tensor| t.get(a).unwrap().get(b).unwrap();
            assert_same(&of(&codes), &grouped.encode(&of(&x)).unwrap(), "codes");
            assert_same(&of(&values), &grouped.forward(&of(&x)).unwrap(), "values");
        }
        // The mean squared difference, by hand.
        let squares: Vec<f64> = f64s(&x).iter().zip(f64s(&values)).map(|(x, v)| (x - v) * (x - v)).collect();
        let loss = f64s(&grouped.commitment_loss(&x).unwrap())[0];
        approx::assert_relative_eq!(loss, squares.iter().sum::<f64>() / squares.len() as f64, max_relative = 1e-5);
        let none = x.narrow(2, 0, 0).unwrap();
        assert_eq!(grouped.encode(&none).unwrap().dims(), [2, 3, 0, 2, 2]);
        assert_eq!(grouped.decode(&grouped.encode(&none).unwrap()).unwrap().dims(), [2, 3, 0, 6]);
    }
}

#[test]
fn a_row_that_is_not_finite_counts_in_no_group() {
    for device in devices() {
        let x = rows(&[30, 6], DType::F32, &device);
        let bad = tensor(&[1, 6], DType::F32, |i| if i == 5 { f64::NAN } else { 40.0 }).to_device(&device).unwrap();
        let kmeans = KMeans::new(4).init(Init::Even).check_finite(false);
        let with = GroupedResidualQuantizer::train(&Tensor::cat(&[&x, &bad], 0).unwrap(), 2, 2, &kmeans).unwrap();
        let without = GroupedResidualQuantizer::train(&x, 2, 2, &kmeans).unwrap();
        for (a, b) in with.residual().stages().iter().zip(without.residual().stages()) {
            assert_same(a.centroids(), b.centroids(), "entries");
        }
    }
}

#[test]
fn what_has_no_groups_is_refused() {
    let x = rows(&[30, 6], DType::F32, &Device::Cpu);
    let error = GroupedResidualQuantizer::train(&x, 4, 2, &KMeans::new(4)).unwrap_err();
    assert!(matches!(error, Error::Conflict { argument: "m", .. }), "{error}");
    let plain = Codebook::new(&x, Metric::SquaredEuclidean).unwrap();
    let error = GroupedResidualQuantizer::new(ResidualQuantizer::new(vec![plain]).unwrap()).unwrap_err();
    assert!(matches!(error, Error::Rank { argument: "centroids", expected: 3, .. }), "{error}");
    let grouped = GroupedResidualQuantizer::train(&x, 2, 2, &KMeans::new(4)).unwrap();
    let error = grouped.encode(&x.narrow(1, 0, 3).unwrap()).unwrap_err();
    assert!(matches!(error, Error::Size { argument: "x", what: "columns", got: 3, expected: 6 }), "{error}");
    assert!(matches!(grouped.encode(&x.get(0).unwrap()).unwrap_err(), Error::Rank { argument: "x", .. }));
    assert!(matches!(grouped.encode(&x.to_dtype(DType::F64).unwrap()).unwrap_err(), Error::DType { .. }));
    let codes = Tensor::zeros((30, 3, 2), DType::U32, &Device::Cpu).unwrap();
    let error = grouped.decode(&codes).unwrap_err();
    assert!(matches!(error, Error::Size { argument: "codes", what: "groups", got: 3, expected: 2 }), "{error}");
    assert!(grouped.decode(&codes.narrow(1, 0, 2).unwrap().pad_with_zeros(2, 0, 1).unwrap()).is_err());
}
