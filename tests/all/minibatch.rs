//! Running means of rows that come later.

use crate::common::*;
use candle_core::{DType, Device, Tensor};
use candle_flash_kmeans::{assign, Error, Init, KMeans, Metric, MiniBatch};

const RUNNING: [Metric; 3] = [Metric::SquaredEuclidean, Metric::Cosine, Metric::Dot];

fn unit(v: &[f64]) -> Vec<f64> {
    let norm = v.iter().map(|v| v * v).sum::<f64>().sqrt();
    v.iter().map(|v| if norm > 0.0 { v / norm } else { 0.0 }).collect()
}

/// Every step against Sculley's rule in plain loops, one row at a time.
#[test]
fn steps_follow_the_running_means() {
    let mut rng = rng(111);
    for (dtype, metric) in DTYPES.into_iter().flat_map(|t| RUNNING.map(|m| (t, m))) {
        let x = blobs(&[2, 300, 5], 6, dtype, &mut rng);
        // The last centroid gets no row.
        let start =
            Tensor::cat(&[&x.narrow(1, 0, 4).unwrap(), &(x.narrow(1, 0, 1).unwrap() * -30.0).unwrap()], 1).unwrap();
        for device in devices() {
            let what = format!("{dtype:?} {metric:?} on {:?}", device.location());
            let (x, start) = (x.to_device(&device).unwrap(), start.to_device(&device).unwrap());
            let mut running = MiniBatch::new(&start, metric).unwrap();
            let (mut means, mut counts) = (problems(&start), vec![vec![0.0; 5]; 2]);
            for (at, size) in [(0, 100), (100, 1), (101, 199)] {
                let batch = x.narrow(1, at, size).unwrap();
                let before = running.centroids().unwrap();
                let labels = running.step(&batch).unwrap();
                assert_same(&labels, &assign(&batch, &before, metric).unwrap(), &what);
                for (b, rows) in problems(&batch).into_iter().enumerate() {
                    for (x, l) in rows.iter().zip(&u32s(&labels)[b * size..]) {
                        let (x, j) = (if metric == Metric::Cosine { unit(x) } else { x.clone() }, *l as usize);
                        counts[b][j] += 1.0;
                        means[b][j].iter_mut().zip(x).for_each(|(c, x)| *c += (x - *c) / counts[b][j]);
                    }
                }
                assert_eq!(f64s(running.counts()), counts.concat(), "{what}");
                let shown = running.centroids().unwrap();
                assert_eq!((shown.dims(), shown.dtype()), (start.dims(), dtype));
                for (got, want) in problems(&shown).concat().iter().zip(means.concat()) {
                    let want = if metric == Metric::Cosine { unit(&want) } else { want };
                    for (&got, want) in got.iter().zip(want) {
                        let allowed = ulp(want, dtype).max(1e-12);
                        assert!((got - want).abs() <= allowed, "{got:e} for {want:e}, {what}");
                    }
                }
            }
        }
    }
}

/// However rows are cut into batches, the same labels make the same means; and a fit goes on where it ended.
#[test]
fn a_fit_goes_on() {
    let mut rng = rng(112);
    for device in devices() {
        // Clusters so far apart that no row changes sides.
        let x = tensor(&[400, 2], DType::F64, |i| (i / 2 % 4) as f64 * 1000.0).to_device(&device).unwrap();
        let x = (x + uniform(&[400, 2], 0.0, 1.0, DType::F64, &mut rng).to_device(&device).unwrap()).unwrap();
        let kmeans = KMeans::new(4).init(Init::Given(x.narrow(0, 0, 4).unwrap()));
        let mut running = MiniBatch::from_fit(&kmeans.fit(&x.narrow(0, 0, 200).unwrap()).unwrap()).unwrap();
        for part in 4..8 {
            running.step(&x.narrow(0, part * 50, 50).unwrap()).unwrap();
        }
        let whole = kmeans.fit(&x).unwrap();
        assert_eq!(f64s(running.counts()), f64s(&whole.counts));
        for (got, want) in f64s(&running.centroids().unwrap()).into_iter().zip(f64s(&whole.centroids)) {
            assert!((got - want).abs() < 1e-10, "{got} for {want}");
        }
    }
}

#[test]
fn mini_batches_that_do_not_fit_are_refused() {
    for device in devices() {
        let c = ones(&[2, 4, 3], DType::F32, &device);
        assert!(matches!(MiniBatch::new(&c, Metric::Manhattan), Err(Error::Conflict { argument: "metric", .. })));
        let whole = ones(&[4, 3], DType::U32, &device);
        assert!(matches!(MiniBatch::new(&whole, Metric::Dot), Err(Error::DType { argument: "centroids", .. })));
        let mut running = MiniBatch::new(&c, Metric::Dot).unwrap();
        let before = running.centroids().unwrap();
        for shape in [vec![4, 3], vec![3, 5, 3], vec![2, 5, 4]] {
            let error = running.step(&ones(&shape, DType::F32, &device)).unwrap_err();
            assert!(matches!(error, Error::Shape { argument: "x", .. }), "{error}");
        }
        let error = running.step(&ones(&[2, 5, 3], DType::F16, &device)).unwrap_err();
        assert!(matches!(error, Error::DType { argument: "x", .. }), "{error}");
        let error = running.step(&ones(&[2, 0, 3], DType::F32, &device)).unwrap_err();
        assert!(matches!(error, Error::Range { argument: "x rows", got: 0, .. }), "{error}");
        assert_same(&running.centroids().unwrap(), &before, "after refusals");
    }
}

#[test]
fn weights_count_in_running_means() {
    for device in devices() {
        let x = Tensor::new(&[[0f32], [2.], [10.], [14.]], &device).unwrap();
        let weights = Tensor::new(&[1f32, 3., 3., 1.], &device).unwrap();
        let start = Init::Given(Tensor::new(&[[0f32], [10.]], &device).unwrap());
        let kmeans = KMeans::new(2).init(start).sample_weights(&weights);
        let fit = kmeans.fit(&x).unwrap();
        assert_eq!((f64s(&fit.centroids), u32s(&fit.counts)), (vec![1.5, 11.0], vec![2, 2]));
        assert_eq!(f64s(fit.weights.as_ref().unwrap()), [4.0, 4.0]);
        for mut running in [MiniBatch::from_fit(&fit).unwrap(), MiniBatch::train(&x, &kmeans).unwrap()] {
            assert_eq!(f64s(running.counts()), [4.0, 4.0]);
            let next = Tensor::new(&[[3f32], [20.], [19.], [5.]], &device).unwrap();
            running.step_weighted(&next, &Tensor::new(&[2f32, 0., 4., f32::NAN], &device).unwrap()).unwrap();
            assert_eq!(f64s(running.counts()), [6.0, 8.0]);
            assert_eq!(f64s(&running.centroids().unwrap()), [2.0, 15.0]);
        }
        let error =
            MiniBatch::from_fit(&fit).unwrap().step_weighted(&x, &weights.narrow(0, 0, 3).unwrap()).unwrap_err();
        assert!(matches!(error, Error::Shape { argument: "sample_weights", .. }), "{error}");
        // Of several runs, those of the best.
        let rows = uniform(&[200, 2], 0.0, 1.0, DType::F32, &mut rng(114)).to_device(&device).unwrap();
        let weights = uniform(&[200], 2.0, 1.0, DType::F32, &mut rng(115)).to_device(&device).unwrap();
        let fit = KMeans::new(6).n_init(4).sample_weights(&weights).fit(&rows).unwrap();
        let (labels, w) = (u32s(&fit.labels), f64s(&weights));
        for (j, got) in f64s(fit.weights.as_ref().unwrap()).into_iter().enumerate() {
            let want = sum(labels.iter().zip(&w).filter(|(&label, _)| label as usize == j).map(|(_, w)| *w));
            assert!((got - want).abs() < 1e-9, "cluster {j}: {got} for {want}");
        }
    }
}

#[test]
fn saved_means_go_on() {
    let path = std::env::temp_dir().join(format!("mini-batch-{}.safetensors", std::process::id()));
    let mut rng = rng(116);
    for (device, metric) in devices().into_iter().flat_map(|device| RUNNING.map(|m| (device.clone(), m))) {
        for (dtype, batch) in DTYPES.into_iter().flat_map(|t| [vec![], vec![2, 2]].map(|b| (t, b))) {
            let x = blobs(&[&batch[..], &[60, 3]].concat(), 5, dtype, &mut rng).to_device(&device).unwrap();
            let mut running = MiniBatch::train(&x, &KMeans::new(4).metric(metric)).unwrap();
            running.step(&x).unwrap();
            running.save(&path).unwrap();
            let mut back = MiniBatch::load(&path, &device).unwrap();
            assert_eq!(back.metric(), metric);
            for _ in 0..2 {
                assert_same(&back.centroids().unwrap(), &running.centroids().unwrap(), "centroids");
                assert_same(back.counts(), running.counts(), "counts");
                assert_same(&back.step(&x).unwrap(), &running.step(&x).unwrap(), "labels");
            }
            let moved = running.to_device(&Device::Cpu).unwrap().to_dtype(DType::F32).unwrap();
            assert_same(moved.counts(), &running.counts().to_device(&Device::Cpu).unwrap(), "moved counts");
            let narrow = moved.to_dtype(dtype).unwrap().centroids().unwrap();
            assert_same(&narrow, &running.centroids().unwrap().to_device(&Device::Cpu).unwrap(), "there and back");
            assert!(moved.to_dtype(DType::U32).is_err());
        }
    }
    let x = blobs(&[60, 3], 5, DType::F32, &mut rng);
    KMeans::new(4).fit(&x).unwrap().save(&path).unwrap();
    assert!(matches!(MiniBatch::load(&path, &Device::Cpu), Err(Error::Format { .. })));
    std::fs::remove_file(&path).unwrap();
}

/// Dead centroids against scikit-learn's rule in plain loops, but for which rows they move to.
#[test]
fn dead_centroids_start_again_from_rows() {
    for (device, metric) in devices().into_iter().flat_map(|d| RUNNING.map(|m| (d.clone(), m))) {
        let x = blobs(&[2, 400, 4], 5, DType::F64, &mut rng(113)).to_device(&device).unwrap();
        // The last two are far from all rows, by any metric.
        let far = (x.narrow(1, 0, 2).unwrap() * if metric == Metric::Dot { 0.0 } else { -30.0 }).unwrap();
        let start = Tensor::cat(&[&x.narrow(1, 0, 6).unwrap(), &far], 1).unwrap();
        let (ratio, k) = (0.2, 8);
        let mut running = MiniBatch::new(&start, metric).unwrap().reassignment_ratio(ratio, 3).unwrap();
        let mut seen = 0;
        let mut moved = 0;
        for at in (0..400).step_by(50) {
            let batch = x.narrow(1, at, 50).unwrap();
            let mut plain = running.clone().reassignment_ratio(0.0, 0).unwrap();
            let labels = running.step(&batch).unwrap();
            assert_same(&plain.step(&batch).unwrap(), &labels, "labels are those of before");
            seen += 50;
            let due = seen >= 10 * k;
            seen = if due { 0 } else { seen };
            let (was, is) = (problems(&plain.centroids().unwrap()), problems(&running.centroids().unwrap()));
            let (had, has) = (f64s(plain.counts()), f64s(running.counts()));
            for b in 0..2 {
                let own = &had[b * k..][..k];
                let most = own.iter().copied().fold(0.0, f64::max);
                let dead: Vec<_> = own.iter().map(|&w| w == 0.0 || due && w < ratio * most).collect();
                let stay = own.iter().zip(&dead).filter(|(_, dead)| !**dead).map(|(w, _)| *w);
                let least = stay.fold(f64::INFINITY, f64::min);
                for j in 0..k {
                    if !dead[j] {
                        assert_eq!((&is[b][j], has[b * k + j]), (&was[b][j], own[j]), "centroid {j} stays");
                        continue;
                    }
                    moved += 1;
                    let row = |x: &Vec<f64>| if metric == Metric::Cosine { unit(x) } else { x.clone() };
                    let near = |x: &Vec<f64>| row(x).iter().zip(&is[b][j]).all(|(a, b)| (a - b).abs() <= 1e-12);
                    assert!(problems(&batch)[b].iter().any(near), "centroid {j} is a row");
                    assert_eq!(has[b * k + j], least, "it weighs as the lightest that stays");
                }
            }
        }
        assert!(moved >= 2, "{moved} moved");

        // The same rows and seed do the same, and a file goes on.
        let folder = Folder::new("minibatch");
        let path = folder.0.join("running.safetensors");
        running.save(&path).unwrap();
        let mut loaded = MiniBatch::load(&path, &device).unwrap();
        for at in [0, 150] {
            let batch = (x.narrow(1, at, 50).unwrap() * 40.0).unwrap();
            assert_same(&loaded.step(&batch).unwrap(), &running.step(&batch).unwrap(), "labels");
            assert_same(&loaded.centroids().unwrap(), &running.centroids().unwrap(), "centroids");
        }
    }
    let error =
        MiniBatch::new(&ones(&[2, 2], DType::F32, &Device::Cpu), Metric::Dot).unwrap().reassignment_ratio(2.0, 0);
    assert_eq!(error.unwrap_err().to_string(), "reassignment_ratio: 2 is not between 0 and 1");
}

#[test]
fn a_start_counts_no_rows() {
    for device in devices() {
        let x = blobs(&[2, 100, 3], 4, DType::F32, &mut rng(114)).to_device(&device).unwrap();
        for init in [Init::KMeansPlusPlus, Init::Random] {
            let kmeans = KMeans::new(4).init(init).seed(5);
            let started = MiniBatch::start(&x, &kmeans).unwrap();
            let seeds = kmeans.clone().max_iters(0).fit(&x).unwrap().centroids;
            assert_same(&started.centroids().unwrap(), &seeds, "where a fit starts");
            assert!(f64s(started.counts()).iter().all(|w| *w == 0.0));
            assert_same(
                MiniBatch::start(&x, &kmeans.max_iters(7)).unwrap().counts(),
                started.counts(),
                "no iteration, whatever the settings",
            );
        }
    }
}

/// However many centroids are dead, those that move have rows of their own, at most half of a batch.
#[test]
fn dead_centroids_do_not_share_rows() {
    for device in devices() {
        let (k, rows) = (64, 11);
        let start = (ones(&[2, k, 2], DType::F64, &device) * 1e3).unwrap();
        let mut running = MiniBatch::new(&start, Metric::SquaredEuclidean).unwrap();
        running = running.reassignment_ratio(0.01, 5).unwrap();
        for step in 0..3 {
            let batch = uniform(&[2, rows, 2], 0.0, 1.0, DType::F64, &mut rng(120 + step)).to_device(&device).unwrap();
            let mask = tensor(&[2, rows], DType::F64, |i| f64::from(i % rows != 3)).to_device(&device).unwrap();
            let before = problems(&running.centroids().unwrap());
            running.step_weighted(&batch, &mask).unwrap();
            let (after, batch) = (problems(&running.centroids().unwrap()), problems(&batch));
            for b in 0..2 {
                let on_row = |row: &Vec<f64>| after[b].iter().filter(|c| *c == row).count();
                let shared: Vec<_> = batch[b].iter().map(on_row).collect();
                assert!(shared.iter().all(|&centroids| centroids <= 1), "step {step}: {shared:?}");
                assert_eq!((shared.iter().sum::<usize>(), shared[3]), (5, 0), "step {step}: {shared:?}");
                let same = before[b].iter().zip(&after[b]).filter(|(before, after)| before == after).count();
                // Beside those that move, one that had all rows of the first step.
                assert!(same >= k - 1 - 5 * (step as usize + 1), "step {step}: {same} stay");
            }
        }
        // A batch of one row has a start for one.
        let mut running = MiniBatch::new(&start, Metric::SquaredEuclidean).unwrap();
        running = running.reassignment_ratio(0.01, 5).unwrap();
        running.step(&ones(&[2, 1, 2], DType::F64, &device)).unwrap();
        assert_eq!(f64s(&running.centroids().unwrap()).iter().filter(|v| **v == 1.0).count(), 2 * 2 * 2);
    }
}

/// Means that a file's dtype does not hold are refused when it is read.
#[test]
fn a_file_of_means_beyond_its_dtype_is_refused() {
    let folder = Folder::new("beyond");
    let path = folder.0.join("running.safetensors");
    let start = Tensor::new(&[[1e10f64, 0.0], [1.0, 2.0]], &Device::Cpu).unwrap();
    MiniBatch::new(&start, Metric::SquaredEuclidean).unwrap().save(&path).unwrap();
    let bytes = std::fs::read(&path).unwrap();
    let text = String::from_utf8_lossy(&bytes[8..]).into_owned();
    let at = 8 + text.find("\"dtype\":\"f64\"").expect("the dtype of rows");
    let mut changed = bytes.clone();
    changed[at..at + 13].copy_from_slice(b"\"dtype\":\"f16\"");
    std::fs::write(&path, changed).unwrap();
    assert!(matches!(MiniBatch::load(&path, &Device::Cpu), Err(Error::Format { .. })));
}
