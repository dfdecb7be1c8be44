//! The GPUs that an example shares its rows out to.

use anyhow::{Context, Result};
use candle_flash_kmeans::Devices;

/// `all`, or the numbers of GPUs with commas between them.
pub fn parse(text: &str) -> Result<Devices> {
    if text == "all" {
        return Ok(Devices::All);
    }
    let numbers = text.split(',').map(str::parse).collect::<Result<_, _>>();
    Ok(Devices::These(numbers.context("neither all nor numbers of GPUs with commas between them")?))
}
