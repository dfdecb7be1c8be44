//! One style for bars.

use anyhow::Result;
use indicatif::{ProgressBar, ProgressStyle};

/// A bar of so many steps, and what they are.
pub fn progress(steps: usize, what: &'static str) -> Result<ProgressBar> {
    let style = ProgressStyle::with_template("{msg:8} {bar:30} {pos} of {len}, {eta} to go")?;
    Ok(ProgressBar::new(steps as u64).with_style(style).with_message(what))
}
