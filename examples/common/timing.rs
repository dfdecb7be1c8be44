//! Wall-clock time of work on a device.
#![allow(dead_code)] // Every example compiles this file and uses its own part of it.

use anyhow::Result;
use candle_core::Device;
use std::time::Instant;

/// The result of some work on a device, and its seconds.
pub fn seconds<T>(device: &Device, work: impl FnOnce() -> Result<T>) -> Result<(T, f64)> {
    device.synchronize()?;
    let start = Instant::now();
    let result = work()?;
    device.synchronize()?;
    Ok((result, start.elapsed().as_secs_f64()))
}

/// The last result and the median seconds of some calls, after one that warms up.
pub fn timed<T>(device: &Device, mut call: impl FnMut() -> Result<T>) -> Result<(T, f64)> {
    let mut result = call()?;
    let mut seconds = Vec::new();
    for _ in 0..5 {
        device.synchronize()?;
        let start = Instant::now();
        result = call()?;
        device.synchronize()?;
        seconds.push(start.elapsed().as_secs_f64());
    }
    seconds.sort_by(f64::total_cmp);
    Ok((result, seconds[seconds.len() / 2]))
}

pub fn ms(seconds: f64) -> String {
    format!("{:.3} ms", seconds * 1e3)
}
