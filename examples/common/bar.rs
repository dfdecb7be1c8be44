//! A bar in the terminal for what goes over a source.

use candle_flash_kmeans::{StreamOptions, StreamProgress};
use indicatif::{ProgressBar, ProgressStyle};
use std::time::Duration;

/// The same options with a bar on standard error, which a terminal shows and a file does not get; as they are with `quiet`.
pub fn with_bar(options: StreamOptions, quiet: bool) -> StreamOptions {
    if quiet {
        return options;
    }
    let bar = ProgressBar::new(0);
    let style = ProgressStyle::with_template("{prefix} [{bar:20}] {msg}").expect("the template is valid");
    bar.set_style(style.progress_chars("=> "));
    options.on_progress(move |progress| show(&bar, progress))
}

fn show(bar: &ProgressBar, progress: &StreamProgress) {
    bar.set_length(progress.of_rows);
    bar.set_prefix(progress.pass.to_string());
    bar.set_message(message(progress));
    bar.set_position(progress.rows);
    if progress.left() == Some(Duration::ZERO) {
        bar.finish_and_clear();
        bar.reset();
    }
}

/// Rates, and the time that is left of the pass and, at most, of all of it.
fn message(progress: &StreamProgress) -> String {
    let seconds =
        |left: Option<Duration>| left.map_or("?".into(), |left| format!("{:.0} s", left.as_secs_f64().ceil()));
    let (rows, bytes) = (progress.rows_per_second() / 1e6, progress.bytes_per_second() / 1e6);
    let (pass, all) = (seconds(progress.pass_left()), seconds(progress.left()));
    format!("{rows:.2} M rows/s, {bytes:.0} MB/s, {pass} left, of all {all}")
}
