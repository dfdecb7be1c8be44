//! Whoever watches a stream hears of each pass in turn, how much of it is done, and what was read for it.

use crate::common::*;
use candle_core::{DType, Device, Tensor};
use candle_flash_kmeans::{
    EmptyClusters, Init, KMeans, Metric, Pass, Source, StoredType, StreamOptions, StreamProgress,
};
use std::{
    sync::{Arc, Mutex},
    thread,
    time::Duration,
};

/// Longer than reports are apart, so that every block of rows that is read is reported.
const READ: Duration = Duration::from_millis(120);

/// The rows of `x`, each read of which takes a while.
fn slow(x: &Tensor) -> Source<'static> {
    let (data, d) = (f64s(x), x.dim(1).unwrap());
    Source::from_fn(x.dim(0).unwrap() as u64, d, StoredType::F64, move |rows, into| {
        thread::sleep(READ);
        let values = &data[rows.start as usize * d..rows.end as usize * d];
        into.chunks_exact_mut(8).zip(values).for_each(|(into, v)| into.copy_from_slice(&v.to_ne_bytes()));
        Ok(())
    })
    .unwrap()
}

/// All rows in one block, with room to stay or without, and what is heard of them.
fn heard(device: &Device, x: &Tensor, stay: bool) -> (StreamOptions, Arc<Mutex<Vec<StreamProgress>>>) {
    let (heard, n) = (Arc::new(Mutex::new(vec![])), x.dim(0).unwrap());
    let (log, moving) = (heard.clone(), if device.is_cpu() { 8 } else { 2 });
    let memory = (moving + usize::from(stay)) * n * x.dim(1).unwrap() * 8;
    let options = StreamOptions::new(device).block_rows(n).memory(memory);
    (options.on_progress(move |progress| log.lock().unwrap().push(progress.clone())), heard)
}

#[test]
fn every_pass_is_reported() {
    let x = blobs(&[40, 2], 3, DType::F64, &mut rng(1));
    let crowded = Tensor::cat(&[&x.narrow(0, 0, 1).unwrap(), &ones(&[2, 2], DType::F64, &Device::Cpu)], 0).unwrap();
    let iteration = |run, iteration| Pass::Iteration { run, iteration, max_iters: 2 };
    let relocation = |iteration| Pass::Relocation { run: 0, iteration, max_iters: 2 };
    let plain = KMeans::new(3).tol(0.0).max_iters(2).on_iteration(|_| ());
    for device in devices() {
        let crowded = Init::Given(crowded.to_device(&device).unwrap());
        for (settings, expected) in [
            (plain.clone(), vec![Pass::Bounds, iteration(0, 1), iteration(0, 2), Pass::Labels { run: 0 }]),
            (plain.clone().tol(1e-9).max_iters(0), vec![Pass::Bounds, Pass::Variance, Pass::Labels { run: 0 }]),
            (
                plain.clone().max_iters(0).init(Init::KMeansParallel),
                [
                    vec![Pass::Bounds],
                    (1..=7).map(|pass| Pass::Start { run: 0, pass }).collect(),
                    vec![Pass::Labels { run: 0 }],
                ]
                .concat(),
            ),
            (
                plain.clone().max_iters(0).n_init(2).metric(Metric::Cosine),
                vec![Pass::Bounds, Pass::Labels { run: 0 }, Pass::Labels { run: 1 }],
            ),
            (
                plain.clone().empty_clusters(EmptyClusters::Relocate).init(crowded),
                vec![
                    Pass::Bounds,
                    iteration(0, 1),
                    relocation(1),
                    relocation(1),
                    iteration(0, 2),
                    relocation(2),
                    Pass::Labels { run: 0 },
                ],
            ),
        ] {
            let (options, heard) = heard(&device, &x, false);
            settings.fit_stream(&slow(&x), &options).unwrap();
            let heard = heard.lock().unwrap();
            assert_eq!(heard.iter().map(|progress| progress.pass).collect::<Vec<_>>(), expected);
            for progress in heard.iter() {
                assert_eq!((progress.rows, progress.of_rows, progress.bytes), (40, 40, 40 * 16));
                assert!(progress.elapsed >= READ && progress.rows_per_second() <= 40.0 / READ.as_secs_f64());
                assert_eq!(progress.pass_left(), Some(Duration::ZERO));
            }
            let left: Vec<_> = heard.iter().map(|progress| progress.left().unwrap()).collect();
            assert!(left[0] >= READ * (expected.len() as u32 - 2) && left[left.len() - 1].is_zero(), "{left:?}");
        }
    }
}

/// The end is heard of, however soon it comes, and rows that stay are not read again.
#[test]
fn the_end_is_reported() {
    let x = blobs(&[40, 2], 3, DType::F64, &mut rng(2));
    let source = Source::from_tensor(&x).unwrap();
    for device in devices() {
        let (options, heard) = heard(&device, &x, true);
        let fit = KMeans::new(3).fit_stream(&source, &options).unwrap();
        let fit_heard = std::mem::take(&mut *heard.lock().unwrap());
        let end = fit_heard.last().unwrap();
        assert_eq!((fit_heard[0].pass, fit_heard[0].bytes), (Pass::Bounds, 640));
        assert_eq!((end.pass, end.rows, end.bytes), (Pass::Labels { run: 0 }, 40, 0));
        fit.predict_stream(&source, &options, |_, _| Ok(())).unwrap();
        let end = heard.lock().unwrap().pop().unwrap();
        assert_eq!((end.pass, end.rows, end.bytes), (Pass::Labels { run: 0 }, 40, 640));
        assert_eq!(end.left(), Some(Duration::ZERO));
    }
}
