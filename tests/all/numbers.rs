//! Labels of numbers that fast arithmetic gets wrong: far from the origin, tiny, huge, nearly equal, not finite.

use crate::common::*;
use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use candle_flash_kmeans::{assign, assign_with_distances, KMeans, Metric};
use rand::Rng;
use rand_chacha::ChaCha8Rng;

/// Labels and distances equal the specification on every device.
#[track_caller]
fn check(x: &Tensor, c: &Tensor, devices: &[Device], what: &str) {
    for metric in METRICS {
        let (labels, distances) = expected(x, c, metric);
        for device in devices {
            let what = format!("{what}, {metric:?} {:?} on {:?}", x.dtype(), device.location());
            let (x, c) = (x.to_device(device).unwrap(), c.to_device(device).unwrap());
            let (got, away) = assign_with_distances(&x, &c, metric).unwrap();
            let (got, away) = (u32s(&got), f64s(&away));
            let wrong: Vec<_> = (0..got.len()).filter(|&i| got[i] != labels[i]).collect();
            if let Some(&i) = wrong.first() {
                let (w, n) = (wrong.len(), got.len());
                panic!(
                    "{what}: {w} of {n}; {i} got {} at {:e}, not {} at {:e}",
                    got[i], away[i], labels[i], distances[i]
                );
            }
            assert!(away.iter().zip(&distances).all(|(a, b)| a == b || a.is_nan() && b.is_nan()), "{what}: distances");
        }
    }
}

/// The case in every type that can hold it.
#[track_caller]
fn check_in_all(x: &Tensor, c: &Tensor, devices: &[Device], what: &str) {
    let holds = |t: &Tensor| f64s(t).iter().all(|v| v.is_finite());
    for dtype in DTYPES {
        let (x, c) = (x.to_dtype(dtype).unwrap(), c.to_dtype(dtype).unwrap());
        if holds(&x) && holds(&c) {
            check(&x, &c, devices, what);
        }
    }
}

fn wide(shape: &[usize], offset: f64, scale: f64, rng: &mut ChaCha8Rng) -> Tensor {
    uniform(shape, offset, scale, DType::F64, rng)
}

#[test]
fn far_from_the_origin() {
    let (devices, rng) = (devices(), &mut rng(3));
    for power in [0, 4, 8, 12, 16] {
        for scale in [1.0, 0.01] {
            for d in [1, 3, 64, 130] {
                let offset = 2f64.powi(power);
                let (x, c) = (wide(&[100, d], offset, scale, rng), wide(&[70, d], offset, scale, rng));
                check_in_all(&x, &c, &devices, &format!("offset 2^{power}, d {d}"));
            }
        }
    }
}

/// No one shift helps here: blobs far apart, and in each of them centroids within a thousandth of each other.
#[test]
fn tight_clusters_in_far_blobs() -> Result<()> {
    let (devices, rng) = (devices(), &mut rng(4));
    for (d, apart, spread) in [(64, 100.0, 0.01), (7, 100.0, 0.1), (33, 1e4, 1e-3), (128, 1.0, 1e-6)] {
        let blobs = wide(&[32, 1, d], 0.0, apart, rng);
        let mut near = |n: usize| blobs.broadcast_add(&wide(&[32, n, d], 0.0, spread, rng))?.reshape((32 * n, d));
        let (x, c) = (near(6)?, near(8)?);
        check_in_all(&x, &c, &devices, &format!("blobs {apart} apart, {spread} wide, d {d}"));
    }
    Ok(())
}

/// Centroids that differ from each other by the last bit of one number.
#[test]
fn neighbours_in_the_last_bit() -> Result<()> {
    let (devices, rng) = (devices(), &mut rng(5));
    for dtype in DTYPES {
        for d in [1, 5, 64, 300] {
            let row = f64s(&uniform(&[d], 1.0, 0.5, dtype, rng));
            let step = |i: usize, v: f64| if i / d == 0 { v } else { v + ulp(v, dtype) * ((i / d % 7) as f64 - 3.0) };
            let c = tensor(&[40, d], dtype, |i| if i % d == i / d % d { step(i, row[i % d]) } else { row[i % d] });
            let x = tensor(&[60, d], dtype, |i| row[i % d] + ulp(row[i % d], dtype) * rng.random_range(-3..=3) as f64);
            check(&x, &c, &devices, &format!("last bits, d {d}"));
        }
    }
    Ok(())
}

#[test]
fn every_magnitude() -> Result<()> {
    let (devices, rng) = (devices(), &mut rng(6));
    for power in [
        -1074, -1060, -600, -540, -300, -149, -140, -126, -100, -80, -70, -60, -30, -24, -14, 14, 30, 60, 63, 100, 126,
        400, 511, 600,
    ] {
        let of = |n: usize, rng: &mut ChaCha8Rng| {
            let (small, rest) = (power.max(-1000), power - power.max(-1000));
            Ok::<_, anyhow::Error>(((wide(&[n, 20], 0.0, 2.0, rng) * 2f64.powi(small))? * 2f64.powi(rest))?)
        };
        let (x, c) = (of(50, rng)?, of(40, rng)?);
        let plain = wide(&[10, 20], 0.0, 1.0, rng);
        let name = |what: &str| format!("{what}, 2^{power}");
        check_in_all(&x, &c, &devices, &name("alike"));
        check_in_all(&x, &plain, &devices, &name("scaled rows"));
        check_in_all(&plain, &c, &devices, &name("scaled centroids"));
        check_in_all(&x, &Tensor::cat(&[&c, &plain], 0)?, &devices, &name("centroids of two magnitudes"));
        check_in_all(&Tensor::cat(&[&plain, &x], 0)?, &c, &devices, &name("rows of two magnitudes"));
    }
    Ok(())
}

/// Rows and centroids whose directions nearly agree, at magnitudes whose squares leave the type's range.
#[test]
fn near_ties_at_small_magnitudes() -> Result<()> {
    let (devices, rng) = (devices(), &mut rng(7));
    for power in [-500, -300, -120, -90, -75, -70, -64, -60] {
        let row = wide(&[1, 32], 0.0, 1.0, rng);
        let near = |n: usize, scale: f64, rng: &mut ChaCha8Rng| row.broadcast_add(&wide(&[n, 32], 0.0, scale, rng));
        let (x, c) = ((near(40, 0.5, rng)? * 2f64.powi(power))?, near(60, 1e-6, rng)?);
        check_in_all(&x, &c, &devices, &format!("rows of 2^{power}"));
        check_in_all(&x, &(&c * 2f64.powi(power))?, &devices, &format!("all of 2^{power}"));
        check_in_all(&c, &x, &devices, &format!("centroids of 2^{power}"));
    }
    Ok(())
}

#[test]
fn odd_ones_out() -> Result<()> {
    let (devices, rng) = (devices(), &mut rng(8));
    for d in [1, 2, 17, 64, 100] {
        let (x, c) = (wide(&[90, d], 0.0, 1.0, rng), wide(&[70, d], 0.0, 1.0, rng));
        let with = |t: &Tensor, odd: f64| Tensor::cat(&[t, &tensor(&[1, d], DType::F64, |_| odd), t], 0);
        for odd in [0.0, -0.0, 60000.0, -65504.0, 1e30, 3e38, 1e200, 1e-7, 1e-40, 1e-300] {
            check_in_all(&with(&x, odd)?, &c, &devices, &format!("one row of {odd:e}"));
            check_in_all(&x, &with(&c, odd)?, &devices, &format!("one centroid of {odd:e}"));
            check_in_all(&with(&x, odd)?, &with(&c, odd)?, &devices, &format!("both of {odd:e}"));
        }
        check_in_all(&x, &x.neg()?, &devices, "opposites");
        check_in_all(&(&x * 60000.0)?, &(&c * 65000.0)?, &devices, "near the largest f16");
    }
    Ok(())
}

/// Unchecked NaN and infinities: labels stay in range and other rows have theirs; a spoiled centroid wins no row.
#[test]
fn non_finite_values_stay_where_they_are() -> Result<()> {
    let rng = &mut rng(9);
    for device in devices() {
        for (dtype, bad) in
            DTYPES.into_iter().flat_map(|t| [f64::NAN, f64::INFINITY, f64::NEG_INFINITY].map(|v| (t, v)))
        {
            for (row, column) in [(0, 0), (99, 32), (63, 16), (64, 31)] {
                let x = uniform(&[100, 33], 0.0, 1.0, dtype, rng);
                let c = uniform(&[20, 33], 0.0, 1.0, dtype, rng);
                let clean = f64s(&x);
                let y = tensor(&[100, 33], dtype, |i| if i == row * 33 + column { bad } else { clean[i] });
                let (on_y, on_c) = (y.to_device(&device)?, c.to_device(&device)?);
                for metric in METRICS {
                    let what = format!("{bad} at {row}, {column}: {metric:?} {dtype:?} on {:?}", device.location());
                    let (want, got) = (spec_labels(&x, &c, metric), u32s(&assign(&on_y, &on_c, metric)?));
                    assert!(got[row] < 20, "{what}");
                    assert!((0..100).all(|i| i == row || got[i] == want[i]), "{what}");
                    let among = u32s(&assign(&on_c, &on_y, metric)?);
                    let kept: Vec<u32> = (0..100).filter(|&j| j as usize != row).collect();
                    let finite = x.index_select(&Tensor::new(&kept[..], &Device::Cpu)?, 0)?;
                    let best = spec_labels(&c, &finite, metric).into_iter().map(|j| kept[j as usize]);
                    // An infinite product is the smallest distance there is: only there may the spoiled centroid win.
                    let fair = metric != Metric::Dot || bad.is_nan();
                    assert!(
                        among.iter().zip(best).all(|(&a, b)| a == b || !fair && a as usize == row),
                        "{what}: centroid"
                    );
                    let fit = KMeans::new(4).metric(metric).check_finite(false).max_iters(3).fit(&on_y)?;
                    assert!(u32s(&fit.labels).iter().all(|&l| l < 4), "{what}: fit");
                }
            }
        }
    }
    Ok(())
}
