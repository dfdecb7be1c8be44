//! What the example `semantic_ids` assigns and counts, on rows whose answers are known.

#[path = "../examples/semantic_ids/ids.rs"]
mod ids;

use anyhow::Result;
use candle_core::{Device, Tensor};
use ids::{balanced, quality, residual, sharing_by_chance, unique, with_room, Codes, Quality};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

const DIM: usize = 5;

fn random(rows: usize, seed: u64) -> Result<Tensor> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let values: Vec<f32> = (0..rows * DIM).map(|_| rng.random_range(-1.0..1.0)).collect();
    Ok(Tensor::from_vec(values, (rows, DIM), &Device::Cpu)?)
}

fn rows(x: &Tensor) -> Result<Vec<Vec<f64>>> {
    Ok(x.to_dtype(candle_core::DType::F64)?.to_vec2()?)
}

fn distance(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum()
}

fn sizes(labels: impl Iterator<Item = u32>, k: usize) -> Vec<usize> {
    let mut sizes = vec![0; k];
    labels.for_each(|label| sizes[label as usize] += 1);
    sizes
}

/// The nearest pair of those that are left, again and again.
#[test]
fn rows_take_the_nearest_centroids_that_have_room() -> Result<()> {
    for (n, k, seed) in [(23, 4, 1), (24, 4, 2), (7, 7, 3), (5, 8, 4)] {
        let (x, centroids) = (random(n, seed)?, random(k, seed + 100)?);
        let (of_x, of_c) = (rows(&x)?, rows(&centroids)?);
        let (mut room, mut expected) = (vec![n.div_ceil(k); k], vec![None; n]);
        for _ in 0..n {
            let free = (0..n).filter(|&i| expected[i].is_none());
            let pairs = free.flat_map(|i| (0..k).map(move |j| (i, j))).filter(|&(_, j)| room[j] > 0);
            let away = |&(i, j): &(usize, usize)| distance(&of_x[i], &of_c[j]);
            let (i, j) = pairs.min_by(|a, b| away(a).total_cmp(&away(b))).expect("there is room for all");
            expected[i] = Some(j as u32);
            room[j] -= 1;
        }
        let expected: Vec<u32> = expected.into_iter().flatten().collect();
        assert_eq!(with_room(&x, &centroids)?.to_vec1::<u32>()?, expected, "{n} rows, {k} centroids");
    }
    Ok(())
}

#[test]
fn even_stages_have_no_more_than_their_share() -> Result<()> {
    // Most rows are in one place, so that k-means gives one code to many.
    let x = Tensor::cat(&[(random(70, 5)? * 0.1)?, (random(30, 6)? + 4.0)?], 0)?;
    let (stages, k) = (3, 8);
    let (codes, left) = balanced(&x, stages, k)?;
    for stage in 0..stages {
        assert!(sizes(codes.iter().map(|id| id[stage]), k).into_iter().all(|size| size <= 13), "stage {stage}");
    }
    let (plain, least) = residual(&x, stages, k)?;
    assert!(sizes(plain.iter().map(|id| id[0]), k).into_iter().any(|size| size > 13));
    assert!((0.0..1.0).contains(&least) && (least..1.0).contains(&left), "{least} and {left} of the variance");
    Ok(())
}

/// What is left over is what the means of an id's codes, stage by stage, do not say.
#[test]
fn variance_left_over_is_that_of_the_means() -> Result<()> {
    let (x, k) = (random(60, 7)?, 4);
    let (codes, left) = balanced(&x, 2, k)?;
    let mut over = rows(&x)?;
    let centre = |rows: &[&Vec<f64>]| -> Vec<f64> {
        (0..DIM).map(|c| rows.iter().map(|row| row[c]).sum::<f64>() / rows.len() as f64).collect()
    };
    let mean = centre(&over.iter().collect::<Vec<_>>());
    let variance: f64 = over.iter().map(|row| distance(row, &mean)).sum();
    for stage in 0..2 {
        let means: Vec<_> = (0..k as u32)
            .map(|code| {
                centre(
                    &over
                        .iter()
                        .zip(&codes)
                        .filter(|(_, id)| id[stage] == code)
                        .map(|(row, _)| row)
                        .collect::<Vec<_>>(),
                )
            })
            .collect();
        for (row, id) in over.iter_mut().zip(&codes) {
            row.iter_mut().zip(&means[id[stage] as usize]).for_each(|(v, mean)| *v -= mean);
        }
    }
    let expected = over.iter().map(|row| distance(row, &[0.0; DIM])).sum::<f64>() / variance;
    assert!((left - expected).abs() < 1e-5, "{left}, expected {expected}");
    Ok(())
}

#[test]
fn collisions_are_pairs_of_equal_ids() -> Result<()> {
    let x = random(80, 8)?;
    let x = x.broadcast_div(&x.sqr()?.sum_keepdim(1)?.sqrt()?)?;
    let of_x = rows(&x)?;
    for (codes, _) in [residual(&x, 2, 5)?, balanced(&x, 2, 5)?] {
        let same = |i: usize| (0..80).filter(|&j| codes[i] == codes[j]).count();
        let closest = |i: usize| {
            let others = (0..80).filter(|&j| j != i);
            others.min_by(|&a, &b| distance(&of_x[i], &of_x[a]).total_cmp(&distance(&of_x[i], &of_x[b])))
        };
        let near = (0..80).filter(|&i| closest(i).is_some_and(|j| codes[i][0] == codes[j][0])).count();
        let expected = Quality {
            distinct: (0..80).filter(|&i| !codes[..i].contains(&codes[i])).count(),
            sharing: (0..80).filter(|&i| same(i) > 1).count(),
            most: (0..80).map(same).max().unwrap_or(0),
            near: near as f64 / 80.0,
        };
        assert!(expected.sharing > 10, "{expected:?}");
        assert_eq!(quality(&codes, &x)?, expected);

        let mut all = unique(&codes);
        assert!(all.iter().zip(&codes).all(|(unique, id)| unique[..2] == id[..] && unique.len() == 3));
        all.sort();
        all.dedup();
        assert_eq!(all.len(), 80);
    }
    let codes: Codes = vec![vec![1, 2], vec![0, 2], vec![1, 2], vec![1, 2]];
    assert_eq!(unique(&codes), [[1, 2, 0], [0, 2, 0], [1, 2, 1], [1, 2, 2]]);
    Ok(())
}

#[test]
fn chance_is_what_draws_come_to() {
    let (n, ids, draws) = (30, 40, 2000);
    let mut rng = ChaCha8Rng::seed_from_u64(9);
    let mut sharing = 0;
    for _ in 0..draws {
        let drawn: Vec<usize> = (0..n).map(|_| rng.random_range(0..ids)).collect();
        sharing += drawn.iter().filter(|id| drawn.iter().filter(|other| other == id).count() > 1).count();
    }
    let (mean, expected) = (sharing as f64 / draws as f64, sharing_by_chance(n, ids as f64));
    // Four standard errors of the mean, each draw of whose terms is between 0 and 30.
    assert!((mean - expected).abs() < 4.0 * 15.0 / (draws as f64).sqrt(), "{mean}, expected {expected}");
}
