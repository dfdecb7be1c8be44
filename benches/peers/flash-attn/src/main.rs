//! Times candle-flash-attn at the shapes of the examples `attention` and `video_attention`, a line of JSON for each.
//!
//! ```text
//! cargo run --release --manifest-path benches/peers/flash-attn/Cargo.toml
//! ```
//! The build fetches CUTLASS; `CANDLE_FLASH_ATTN_BUILD_DIR` keeps what it makes.

use candle_core::{DType, Device, Result, Tensor};
use candle_flash_attn::flash_attn;
use std::time::Instant;

const HEAD_DIM: usize = 128;
/// Calls queued one after another between two waits, and how often: the median counts.
const QUEUED: u32 = 5;
const ROUNDS: usize = 5;

/// The median milliseconds of attention of `queries` tokens to `tokens`.
fn ms(device: &Device, batch: usize, [queries, tokens]: [usize; 2], [heads, key_heads]: [usize; 2]) -> Result<f64> {
    let random = |tokens, heads| {
        let x = Tensor::randn(0f32, 1f32, (batch, tokens, heads, HEAD_DIM), device)?;
        x.to_dtype(DType::F16)
    };
    let (q, k, v) = (random(queries, heads)?, random(tokens, key_heads)?, random(tokens, key_heads)?);
    let scale = 1.0 / (HEAD_DIM as f32).sqrt();
    flash_attn(&q, &k, &v, scale, false)?;
    let mut times = [0.0; ROUNDS];
    for time in &mut times {
        device.synchronize()?;
        let start = Instant::now();
        for _ in 0..QUEUED {
            flash_attn(&q, &k, &v, scale, false)?;
        }
        device.synchronize()?;
        *time = start.elapsed().as_secs_f64() * 1e3 / f64::from(QUEUED);
    }
    times.sort_by(f64::total_cmp);
    Ok(times[ROUNDS / 2])
}

fn main() -> Result<()> {
    let device = Device::new_cuda(0)?;
    for tokens in [32_768, 65_536, 131_072] {
        for batch in [1, 4, 16] {
            let ms = ms(&device, batch, [1, tokens], [32, 8])?;
            println!(r#"{{"op": "decode", "tokens": {tokens}, "batch": {batch}, "ms": {ms:.4}}}"#);
        }
    }
    for tokens in [32_768, 75_600] {
        let ms = ms(&device, 1, [tokens, tokens], [24, 24])?;
        println!(r#"{{"op": "dense", "tokens": {tokens}, "batch": 1, "ms": {ms:.3}}}"#);
    }
    Ok(())
}
