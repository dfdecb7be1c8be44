//! Random weights.

use candle_core::{
    quantized::{gguf_file, GgmlDType, QTensor},
    Device, Result, Tensor,
};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::io::Cursor;

pub fn random(n: usize, scale: f32, rng: &mut ChaCha8Rng) -> Vec<f32> {
    (0..n).map(|_| rng.random_range(-scale..scale)).collect()
}

/// A Llama of two layers with random quantized weights: its file, in memory.
pub fn gguf(vocabulary: usize) -> Result<Vec<u8>> {
    let (width, inner, layers, mut rng) = (64, 96, 2, ChaCha8Rng::seed_from_u64(3));
    let mut tensors = vec![];
    let mut add = |name: String, rows: usize, columns: usize, dtype: GgmlDType| {
        let shape = if rows == 0 { vec![columns] } else { vec![rows, columns] };
        let values = random(shape.iter().product(), 0.4, &mut rng);
        tensors.push((name, QTensor::quantize(&Tensor::from_vec(values, shape, &Device::Cpu)?, dtype)?));
        Ok::<_, candle_core::Error>(())
    };
    add("token_embd.weight".into(), vocabulary, width, GgmlDType::Q8_0)?;
    add("output_norm.weight".into(), 0, width, GgmlDType::F32)?;
    for layer in 0..layers {
        for (name, rows, columns) in [
            ("attn_q", width, width),
            ("attn_k", width / 2, width),
            ("attn_v", width / 2, width),
            ("attn_output", width, width),
            ("ffn_gate", inner, width),
            ("ffn_down", width, inner),
            ("ffn_up", inner, width),
        ] {
            add(format!("blk.{layer}.{name}.weight"), rows, columns, GgmlDType::Q8_0)?;
        }
        for name in ["attn_norm", "ffn_norm"] {
            add(format!("blk.{layer}.{name}.weight"), 0, width, GgmlDType::F32)?;
        }
    }
    let number = gguf_file::Value::U32;
    let metadata = [
        ("general.architecture", gguf_file::Value::String("llama".into())),
        ("llama.attention.head_count", number(4)),
        ("llama.attention.head_count_kv", number(2)),
        ("llama.block_count", number(layers)),
        ("llama.embedding_length", number(width as u32)),
        ("llama.rope.dimension_count", number(16)),
        ("llama.attention.layer_norm_rms_epsilon", gguf_file::Value::F32(1e-5)),
    ];
    let metadata: Vec<_> = metadata.iter().map(|(key, value)| (*key, value)).collect();
    let tensors: Vec<_> = tensors.iter().map(|(name, t)| (name.as_str(), t)).collect();
    let mut file = Cursor::new(vec![]);
    gguf_file::write(&mut file, &metadata, &tensors)?;
    Ok(file.into_inner())
}
