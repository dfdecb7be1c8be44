//! `nn::codebook_encode` beside the op of candle-transformers that it stands in for.

#[path = "../../tests/common/mod.rs"]
mod common;

use candle_core::{DType, Device, Tensor};
use candle_flash_kmeans::nn::codebook_encode;
use candle_nn::VarBuilder;
use candle_transformers::models::encodec::{Config, EuclideanCodebook};
use common::*;

/// Small whole numbers: distances are exact.
fn whole(shape: &[usize], seed: u64) -> Tensor {
    integers(shape, 6, DType::F32, &mut rng(seed))
}

/// The op that it stands in for, which the CPU alone has, and what models use elsewhere: f32 both, exact for whole numbers.
#[test]
fn codebook_encode_is_that_of_encodec() {
    let entries = whole(&[20, 8], 6);
    let encodec = |device: &Device| {
        let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, device).unwrap();
        let embed = entries.to_device(device).unwrap();
        let tensors = [("inited", zeros(&[1])), ("cluster_size", zeros(&[20])), ("embed_avg", zeros(&[20, 8]))];
        let tensors = tensors.into_iter().chain([("embed", embed)]).map(|(name, t)| (name.to_string(), t)).collect();
        let config = Config { codebook_size: 20, codebook_dim: Some(8), ..Config::default() };
        EuclideanCodebook::new(&config, VarBuilder::from_tensors(tensors, DType::F32, device)).unwrap()
    };
    for device in devices() {
        // Ties go to the lowest index in both.
        let x = whole(&[2, 50, 8], 5);
        let ours = codebook_encode(&x.to_device(&device).unwrap(), &entries.to_device(&device).unwrap()).unwrap();
        assert_eq!((ours.dims(), ours.dtype()), (&[2, 50][..], DType::U32));
        assert_same(&ours, &encodec(&Device::Cpu).encode(&x).unwrap(), "the op");
        // Which one wins a tie by `argmin` depends on the device, so there is none here.
        let x = (&entries + 0.25).unwrap().to_device(&device).unwrap();
        let ours = codebook_encode(&x, &entries.to_device(&device).unwrap()).unwrap();
        assert_same(&ours, &encodec(&device).encode_slow(&x).unwrap(), "by matmul");
    }
}
