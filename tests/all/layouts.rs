//! Layouts: a view gives the bits of its contiguous copy, and what lies around it is neither read nor written.

use crate::common::*;
use anyhow::Result;
use candle_core::Tensor;
use candle_flash_kmeans::{assign, assign_with_distances, cluster_means, quantize, Init, KMeans};

#[test]
fn layouts_give_the_bits_of_their_copies() -> Result<()> {
    for device in devices() {
        for (case, shape) in [vec![70, 16], vec![300, 33], vec![3, 40, 8], vec![2, 3, 65, 5]].into_iter().enumerate() {
            for (metric, dtype) in METRICS.into_iter().flat_map(|m| DTYPES.map(|t| (m, t))) {
                let rng = &mut rng(case as u64);
                let x = uniform(&shape, 0.0, 1.0, dtype, rng).to_device(&device)?;
                let mut c_shape = shape.clone();
                c_shape[shape.len() - 2] = 19;
                let c = uniform(&c_shape, 0.0, 1.0, dtype, rng).to_device(&device)?;
                let (labels, distances) = assign_with_distances(&x, &c, metric)?;
                let same = |x: &Tensor, c: &Tensor, laid: &Laid, what: &str| {
                    let before = bits(&laid.base);
                    let (l, d) = assign_with_distances(x, c, metric).unwrap();
                    let what = format!("{what} {}, {metric:?} {dtype:?}", laid.name);
                    assert_same(&l, &labels, &what);
                    assert_same(&d, &distances, &what);
                    assert!(before == bits(&laid.base), "{what}: the operand was written");
                };
                layouts(&x).iter().for_each(|laid| same(&laid.view, &c, laid, "x"));
                layouts(&c).iter().for_each(|laid| same(&x, &laid.view, laid, "centroids"));
                for (x, c) in layouts(&x).iter().zip(layouts(&c).iter().rev()) {
                    assert_same(&assign(&x.view, &c.view, metric)?, &labels, &format!("{} and {}", x.name, c.name));
                }
            }
        }
    }
    Ok(())
}

#[test]
fn broadcasts_give_the_bits_of_their_copies() -> Result<()> {
    for device in devices() {
        for (metric, dtype) in METRICS.into_iter().zip(DTYPES) {
            let x = uniform(&[4, 30, 7], 0.0, 1.0, dtype, &mut rng(1)).to_device(&device)?;
            let c = uniform(&[4, 9, 7], 0.0, 1.0, dtype, &mut rng(2)).to_device(&device)?;
            let views = |t: &Tensor| -> Result<Vec<Tensor>> {
                let (b, n, d) = t.dims3()?;
                Ok(vec![
                    t.narrow(0, 1, 1)?.broadcast_as((b, n, d))?,
                    t.narrow(1, 2, 1)?.broadcast_as((b, n, d))?,
                    t.narrow(2, 3, 1)?.broadcast_as((b, n, d))?,
                    t.narrow(0, 1, 1)?.narrow(1, 2, 1)?.broadcast_as((b, n, d))?,
                    t.narrow(0, 3, 1)?.narrow(1, 2, 1)?.narrow(2, 5, 1)?.broadcast_as((b, n, d))?,
                ])
            };
            for x in [vec![x.clone()], views(&x)?].concat() {
                for c in [vec![c.clone()], views(&c)?].concat() {
                    let copies = assign(&x.contiguous()?, &c.contiguous()?, metric)?;
                    assert_same(&assign(&x, &c, metric)?, &copies, &format!("{:?} {:?}", x.layout(), c.layout()));
                }
                let shared = c.narrow(0, 2, 1)?;
                let each = assign(&x, &shared.broadcast_as((4, 9, 7))?.contiguous()?, metric)?;
                assert_same(&assign(&x, &shared.squeeze(0)?, metric)?, &each, "one set of centroids for all");
            }
        }
    }
    Ok(())
}

/// Every op that reads rows, from each layout: a buffer of NaN surrounds it, so reading one element too far would show.
#[test]
fn every_op_stays_inside_its_operands() -> Result<()> {
    for device in devices() {
        for (case, (n, k, d)) in
            [(1, 1, 1), (63, 5, 17), (65, 64, 33), (257, 65, 64), (130, 129, 100)].into_iter().enumerate()
        {
            for (metric, dtype) in METRICS.into_iter().zip(DTYPES).chain(METRICS.into_iter().rev().zip(DTYPES)) {
                let rng = &mut rng(case as u64);
                let x = uniform(&[2, n, d], 0.0, 1.0, dtype, rng).to_device(&device)?;
                let c = uniform(&[2, k, d], 0.0, 1.0, dtype, rng).to_device(&device)?;
                let settings = KMeans::new(k.min(n)).metric(metric).max_iters(3);
                let given = |c: &Tensor| settings.clone().init(Init::Given(c.narrow(1, 0, k.min(n)).unwrap()));
                let (values, labels) = quantize(&x, &c, metric)?;
                let (means, fit) = (cluster_means(&x, &labels, k)?, given(&c).fit(&x)?);
                let (start, away) = (settings.fit(&x)?, fit.transform(&x)?);
                for (x, c) in layouts(&x).into_iter().zip(layouts(&c)) {
                    let (before, what) = ((bits(&x.base), bits(&c.base)), format!("{} {metric:?} {dtype:?}", x.name));
                    assert_same(&quantize(&x.view, &c.view, metric)?.0, &values, &what);
                    assert_same(&cluster_means(&x.view, &labels, k)?, &means, &what);
                    assert_same_fit(&given(&c.view).fit(&x.view)?, &fit, &what);
                    assert_same_fit(&settings.fit(&x.view)?, &start, &what);
                    assert_same(&fit.predict(&x.view)?, &fit.labels, &what);
                    assert_same(&fit.transform(&x.view)?, &away, &what);
                    assert!((bits(&x.base), bits(&c.base)) == before, "{what}: an operand was written");
                }
            }
        }
    }
    Ok(())
}
