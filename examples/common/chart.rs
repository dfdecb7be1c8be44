//! Lines on two logarithmic axes, as an SVG.

use anyhow::{anyhow, Result};
use plotters::prelude::*;
use std::path::Path;

/// Readable in print and for the colour-blind (Okabe and Ito), with two greys and a brown beside theirs.
const COLOURS: [RGBColor; 10] = [
    RGBColor(0, 114, 178),
    RGBColor(86, 180, 233),
    RGBColor(0, 158, 115),
    RGBColor(230, 159, 0),
    RGBColor(204, 121, 167),
    RGBColor(90, 90, 90),
    RGBColor(213, 94, 0),
    RGBColor(0, 0, 0),
    RGBColor(150, 90, 40),
    RGBColor(175, 175, 175),
];
const SIZE: (u32, u32) = (1160, 540);
/// Of the legend, which stands beside the lines: wherever it lay among them, it would cover some.
const LEGEND_WIDTH: u32 = 300;
const LEGEND_LINE: i32 = 24;
const Y_TICKS: [f64; 19] = [
    0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0,
];
const FONT: &str = "sans-serif";

/// The horizontal axis: its name, where it has ticks, and what they say.
pub struct Axis<'a> {
    pub name: &'a str,
    pub ticks: Vec<f64>,
    pub label: fn(&f64) -> String,
}

/// Draws named lines of (x, y) points.
pub fn draw(path: &Path, title: &str, x: Axis, y: &str, lines: &[(&str, Vec<(f64, f64)>)]) -> Result<()> {
    // The error of the backend borrows it.
    draw_lines(path, title, x, y, lines).map_err(|error| anyhow!("cannot draw {}: {error}", path.display()))
}

fn draw_lines(
    path: &Path,
    title: &str,
    x: Axis,
    y: &str,
    lines: &[(&str, Vec<(f64, f64)>)],
) -> Result<(), Box<dyn std::error::Error>> {
    let points = || lines.iter().flat_map(|(_, points)| points.iter().copied());
    let range = |pick: fn((f64, f64)) -> f64, margin: f64| {
        let (low, high) = points().map(pick).fold((f64::MAX, f64::MIN), |(low, high), v| (low.min(v), high.max(v)));
        low / margin..high * margin
    };
    let (x_range, y_range) = (range(|p| p.0, 1.12), range(|p| p.1, 1.3));
    let y_ticks = Y_TICKS.iter().copied().filter(|tick| y_range.contains(tick)).collect();
    let x_ticks = x.ticks.into_iter().filter(|tick| x_range.contains(tick)).collect();
    let area = SVGBackend::new(path, SIZE).into_drawing_area();
    area.fill(&WHITE)?;
    let (plot, legend) = area.split_horizontally(SIZE.0 - LEGEND_WIDTH);
    let mut chart = ChartBuilder::on(&plot)
        .caption(title, (FONT, 24))
        .margin(20)
        .x_label_area_size(60)
        .y_label_area_size(80)
        .build_cartesian_2d(
            x_range.log_scale().with_key_points(x_ticks),
            y_range.log_scale().with_key_points(y_ticks),
        )?;
    chart
        .configure_mesh()
        .x_desc(x.name)
        .y_desc(y)
        .x_label_formatter(&x.label)
        .label_style((FONT, 16))
        .axis_desc_style((FONT, 18))
        .bold_line_style(RGBColor(225, 225, 225))
        .draw()?;
    let mut below = 72;
    for ((name, points), colour) in lines.iter().zip(COLOURS.into_iter().cycle()) {
        let line = colour.filled().stroke_width(3);
        chart.draw_series(LineSeries::new(points.iter().copied(), line).point_size(4))?;
        legend.draw(&PathElement::new([(0, below), (LEGEND_LINE, below)], line))?;
        legend.draw(&Text::new(*name, (LEGEND_LINE + 8, below - 6), (FONT, 16)))?;
        below += LEGEND_LINE;
    }
    area.present()?;
    Ok(())
}
