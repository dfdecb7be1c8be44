//! Fits rows of a file by superkmeans-rs and writes its centroids: `superkmeans_peer ROWS N D K ITERS flat|tree CENTROIDS`, both files f32 without
//! a header. A tree chooses its clusters by their size, which is to be n / k at most. Prints the seconds of the fit.

use std::{env, fs, time::Instant};
use superkmeans::{HierarchicalSuperKMeans, HierarchicalSuperKMeansConfig, SuperKMeans, SuperKMeansConfig};

fn main() {
    let args: Vec<_> = env::args().skip(1).collect();
    let [rows, n, d, k, iters, kind, centroids] = &args[..] else { panic!("ROWS N D K ITERS flat|tree CENTROIDS") };
    let number = |text: &String| text.parse::<usize>().expect("a number");
    let (n, d, k, iters) = (number(n), number(d), number(k), number(iters));
    let bytes = fs::read(rows).expect("rows");
    let x: Vec<f32> = bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
    assert_eq!(x.len(), n * d);
    let base = SuperKMeansConfig { iters: iters as u32, early_termination: false, ..Default::default() };
    let (found, seconds) = if kind == "tree" {
        let aggressive = SuperKMeansConfig { use_aggressive_split: true, ..base };
        let config = HierarchicalSuperKMeansConfig { base: aggressive, max_leaf_size: n / k, ..Default::default() };
        let mut fit = HierarchicalSuperKMeans::with_config(d, config);
        let start = Instant::now();
        (fit.train(&x, n), start.elapsed())
    } else {
        let mut fit = SuperKMeans::with_config(k, d, base);
        let start = Instant::now();
        (fit.train(&x, n), start.elapsed())
    };
    let bytes: Vec<u8> = found.iter().flat_map(|v| v.to_le_bytes()).collect();
    fs::write(centroids, bytes).expect("centroids");
    println!("{}", seconds.as_secs_f64());
}
