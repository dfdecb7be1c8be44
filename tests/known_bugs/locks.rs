//! Locks: whoever waits for work holds nobody up, and nobody waits for ever (rayon#592).

use super::common::*;
use candle_core::{DType, Device, Var};
use candle_flash_kmeans::{
    assign, assign_with_distances, cluster_means, cluster_sums, quantize, sort_by_cluster, Error, Init, KMeans, Metric,
};
use rayon::prelude::*;
use std::{
    process,
    sync::{
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

/// Tasks that have ended.
static ENDED: AtomicUsize = AtomicUsize::new(0);

/// Runs `f`, and ends the process with a message if no task ends for a minute: threads that wait for each other cannot be
/// stopped.
fn watched(what: &str, f: impl FnOnce()) {
    let (done, over) = mpsc::channel::<()>();
    let message = format!("{what}: nothing has ended for a minute, so threads wait for each other");
    let watchdog = thread::spawn(move || loop {
        let before = ENDED.load(SeqCst);
        match over.recv_timeout(Duration::from_secs(60)) {
            Err(mpsc::RecvTimeoutError::Timeout) if ENDED.load(SeqCst) == before => {
                eprintln!("{message}");
                process::abort();
            }
            Err(mpsc::RecvTimeoutError::Timeout) => {}
            _ => break,
        }
    });
    f();
    drop(done);
    watchdog.join().unwrap();
}

/// Runs `tasks` of a pool of so many workers for a while, beside threads that repeat what `writers` do.
fn beside(workers: usize, tasks: impl Fn(usize) + Sync, writers: &[&(dyn Fn(usize) + Sync)]) {
    let (pool, over) = (rayon::ThreadPoolBuilder::new().num_threads(workers).build().unwrap(), AtomicBool::new(false));
    let task = |i| {
        tasks(i);
        ENDED.fetch_add(1, SeqCst);
    };
    thread::scope(|s| {
        let over = &over;
        for write in writers {
            s.spawn(move || (0..).take_while(|_| !over.load(SeqCst)).for_each(write));
        }
        let start = Instant::now();
        while start.elapsed() < Duration::from_millis(200) {
            pool.install(|| (0..4 * workers).into_par_iter().for_each(task));
        }
        over.store(true, SeqCst);
    });
}

const WORKERS: [usize; 3] = [2, 4, 8];

/// A thread repeats a prepared fit while tasks read its centroids and labels.
#[test]
fn a_prepared_fit_runs_while_others_read_its_results() {
    let mut rng = rng(201);
    for d in [1, 32] {
        let x = uniform(&[700, d], 0.0, 1.0, DType::F32, &mut rng);
        let rows = uniform(&[600, d], 0.0, 1.0, DType::F32, &mut rng);
        for init in [Init::Random, Init::KMeansPlusPlus] {
            let settings = KMeans::new(40).max_iters(2).init(init);
            let prepared = settings.prepare(x.shape(), DType::F32, &Device::Cpu).unwrap();
            let (centroids, labels) = (prepared.centroids().clone(), prepared.labels().clone());
            let prepared = std::sync::Mutex::new(prepared);
            for workers in WORKERS {
                watched("a prepared fit", || {
                    let tasks = |i| match i % 4 {
                        0 => drop(assign(&rows, &centroids, Metric::SquaredEuclidean).unwrap()),
                        1 => drop(quantize(&centroids, &rows, Metric::SquaredEuclidean).unwrap()),
                        2 => drop(cluster_means(&x, &labels, 40).unwrap()),
                        _ => drop(sort_by_cluster(&labels, 40).unwrap()),
                    };
                    let run = |_| prepared.lock().unwrap().run(&x).unwrap();
                    beside(workers, tasks, &[&run]);
                });
            }
        }
    }
}

/// Variables that are set while every op reads them: as rows and as centroids, and both at once.
#[test]
fn variables_are_set_while_ops_read_them() {
    let mut rng = rng(202);
    let [a, b] = [(); 2].map(|()| uniform(&[400, 24], 0.0, 1.0, DType::F32, &mut rng));
    let [x, y] = [&a, &b].map(|t| Var::from_tensor(t).unwrap());
    let labels = assign(&a, &b.narrow(0, 0, 50).unwrap(), Metric::SquaredEuclidean).unwrap();
    let (x, y) = (&x, &y);
    for workers in WORKERS {
        watched("variables", || {
            let metric = |i: usize| METRICS[i / 7 % 4];
            let tasks = |i| match i % 7 {
                0 => drop(assign(x, y, metric(i)).unwrap()),
                1 => drop(assign_with_distances(y, x, metric(i)).unwrap()),
                2 => drop(assign(x, x, metric(i)).unwrap()),
                3 => drop(quantize(x, &y.narrow(0, 0, 50).unwrap(), metric(i)).unwrap()),
                4 => drop(cluster_sums(y, &labels, 50).unwrap()),
                5 => {
                    let settings = KMeans::new(5).max_iters(2).metric(metric(i)).init(Init::KMeansPlusPlus);
                    drop(settings.sample_weights(&x.narrow(1, 0, 1).unwrap().abs().unwrap().squeeze(1).unwrap()).fit(x))
                }
                _ => drop(
                    KMeans::new(9).max_iters(2).init(Init::KMeansParallel).fit(&y.narrow(1, 0, 1).unwrap()).unwrap(),
                ),
            };
            beside(workers, tasks, &[&|_| x.set(&a).unwrap(), &|_| y.set(&b).unwrap(), &|_| x.set(&b).unwrap()]);
        });
    }
}

/// The global pool may have no worker left that does not wait itself.
#[test]
fn workers_that_all_wait_are_no_reason_to_wait() {
    let x = uniform(&[1500, 16], 0.0, 1.0, DType::F32, &mut rng(203));
    let (var, start) = (&Var::from_tensor(&x).unwrap(), Instant::now());
    watched("the global pool", || {
        thread::scope(|s| {
            s.spawn(|| {
                while start.elapsed() < Duration::from_millis(300) {
                    var.set(&x).unwrap()
                }
            });
            for _ in 0..4 {
                s.spawn(|| {
                    while start.elapsed() < Duration::from_millis(300) {
                        let tokens = &var.narrow(0, 5, 100).unwrap();
                        (0..8)
                            .into_par_iter()
                            .for_each(|_| drop(assign(tokens, var, Metric::SquaredEuclidean).unwrap()));
                        ENDED.fetch_add(1, SeqCst);
                    }
                });
                s.spawn(|| {
                    while start.elapsed() < Duration::from_millis(300) {
                        assign(var, &var.narrow(0, 5, 100).unwrap(), Metric::SquaredEuclidean).unwrap();
                        ENDED.fetch_add(1, SeqCst);
                    }
                });
            }
        });
    });
}

/// A run on what it overwrites is refused, or right; it does not wait for itself.
#[test]
fn a_run_on_its_own_results_ends() {
    let x = uniform(&[20, 4], 0.0, 1.0, DType::F32, &mut rng(204));
    for init in [Init::Even, Init::KMeansPlusPlus, Init::KMeansParallel] {
        watched("a run on its own centroids", || {
            let mut prepared =
                KMeans::new(20).max_iters(2).init(init.clone()).prepare(x.shape(), DType::F32, &Device::Cpu).unwrap();
            prepared.run(&x).unwrap();
            let own = prepared.centroids().clone();
            let run = prepared.run(&own);
            assert!(matches!(run, Ok(()) | Err(Error::Conflict { .. })), "{run:?}");
            prepared.run(&x).unwrap();
        });
    }
}
