//! CUDA: threads, streams, devices, memory and sizes.

use super::common::*;
use candle_core::DType;
use candle_flash_kmeans::{Init, KMeans, Metric};

/// A fit without a limit of iterations ends when it has converged, whichever kernels run it.
#[test]
fn iterations_without_a_limit_end() {
    let mut rng = rng(901);
    for (dtype, shape, k, metric) in [
        (DType::F16, [2, 700, 64], 16, Metric::SquaredEuclidean),
        (DType::F32, [3, 200, 4], 8, Metric::SquaredEuclidean),
        (DType::F32, [1, 5000, 1], 8, Metric::SquaredEuclidean),
        (DType::F32, [1, 5000, 24], 40, Metric::Cosine),
        (DType::F64, [2, 900, 7], 9, Metric::SquaredEuclidean),
        (DType::F32, [2, 900, 7], 9, Metric::Manhattan),
    ] {
        let x = uniform(&shape, 0.0, 1.0, dtype, &mut rng);
        // Rounded to halves, centroids may go round in circles where none may move at all.
        let tol = if dtype == DType::F64 { 0.0 } else { 1e-4 };
        let settings = KMeans::new(k).metric(metric).init(Init::Even).tol(tol);
        let fit = fit(&settings.clone().max_iters(usize::MAX), &x);
        let most = u32s(&fit.n_iter).into_iter().max().unwrap() as usize;
        assert!(u32s(&fit.converged.to_dtype(DType::U32).unwrap()).iter().all(|&c| c == 1), "{dtype:?} {shape:?}");
        // So does one of which iterations are left over, by any number.
        for more in [0, 1, 300] {
            let same = super::common::fit(&settings.clone().max_iters(most + more), &x);
            assert_same_fit(&fit, &same, &format!("{dtype:?} {shape:?} {metric:?}, {more} more"));
        }
    }
}

/// Rows that cannot be viewed, or not where a kernel can read them, go to the same place in every run.
#[test]
fn copies_of_a_prepared_fit_are_its_own() {
    let mut rng = rng(902);
    for device in devices() {
        for (dtype, shape, k) in [
            (DType::BF16, vec![2, 200, 33], 9),
            (DType::F16, vec![3, 2, 100, 40], 16),
            (DType::F32, vec![2, 3, 100, 24], 9),
            (DType::F64, vec![200, 7], 5),
            (DType::F32, vec![5, 1, 7], 1),
        ] {
            let settings = KMeans::new(k).init(Init::Even).max_iters(5);
            let mut prepared = settings.prepare(&shape[..], dtype, &device).unwrap();
            for _ in 0..2 {
                let t = uniform(&shape, 0.0, 1.0, dtype, &mut rng).to_device(&device).unwrap();
                let want = settings.fit(&t).unwrap();
                for laid in layouts(&t) {
                    prepared.run(&laid.view).unwrap();
                    assert_same_fit(&prepared.fit().unwrap(), &want, &format!("{dtype:?} {shape:?} {}", laid.name));
                }
            }
        }
    }
}

#[cfg(feature = "cuda")]
mod gpu {
    use super::super::common::*;
    use candle_core::{
        cuda_backend::cudarc::driver::{
            sys::{CUgraphInstantiate_flags, CUstreamCaptureMode},
            CudaContext,
        },
        DType, Device, Tensor,
    };
    use candle_flash_kmeans::{
        assign, assign_with_distances, cluster_means, cluster_sums,
        nn::{ClusteredKvCache, Codebook, Ema, EmaCodebook, KeyBudget, KvBudget, ProductQuantizer, RoutedAttention},
        quantize, residuals, select_clusters, sort_by_cluster, testing, top_rows_per_centroid, ClusterBudget, Devices,
        Error, Fit, Init, KMeans, Metric, MiniBatch, Segments, Source, StreamOptions,
    };
    use std::{
        sync::{Mutex, MutexGuard},
        thread,
    };

    /// Whether a GPU is asked for, and the only turn at it: where threads take over from each other the host waits for the
    /// streams of all threads, which no capture of such a stream by another test would survive.
    fn asked_for() -> Option<MutexGuard<'static, ()>> {
        static TURN: Mutex<()> = Mutex::new(());
        devices().iter().any(Device::is_cuda).then(|| TURN.lock().unwrap_or_else(|e| e.into_inner()))
    }

    /// Two GPUs, or none where there is but one, which is said: such a test has proved nothing.
    fn two_gpus(test: &str) -> Option<[Device; 2]> {
        if CudaContext::device_count().unwrap() < 2 {
            println!("{test}: NOT RUN, it takes two GPUs");
            return None;
        }
        Some([0, 1].map(|gpu| Device::new_cuda(gpu).unwrap()))
    }

    fn random(shape: &[usize], dtype: DType, device: &Device, seed: u64) -> Tensor {
        uniform(shape, 0.0, 1.0, dtype, &mut rng(seed)).to_device(device).unwrap()
    }

    /// Queues work of some tenths of a second, so that what this thread queues next is still to be done when another thread,
    /// or another stream, goes on.
    fn keep_busy(device: &Device) {
        let x = Tensor::zeros((8192, 8192), DType::F32, device).unwrap();
        for _ in 0..10 {
            x.matmul(&x).unwrap();
        }
    }

    /// Runs `f` in a thread of its own, which has ended before the work that it has queued has.
    fn elsewhere<R: Send>(f: impl FnOnce() -> R + Send) -> R {
        thread::scope(|scope| scope.spawn(f).join().unwrap())
    }

    fn cache(k: &Tensor, v: &Tensor) -> ClusteredKvCache {
        let mut cache = ClusteredKvCache::new(k.dims()[2]);
        cache.append(k, v).unwrap();
        assert!(cache.cluster().unwrap());
        cache
    }

    /// One cache, one device, two threads, each with a stream of its own: the same scratch.
    #[test]
    fn two_threads_attend_at_once() {
        let Some(_turn) = asked_for() else { return };
        for own_stream in [false, true] {
            let device = if own_stream { Device::new_cuda_with_stream(0) } else { Device::new_cuda(0) }.unwrap();
            // Other columns go through Candle's products, whose handle of cuBLAS keeps memory for one stream.
            let others = own_stream.then_some((DType::F16, 48));
            for (dtype, d) in [(DType::F16, 128), (DType::F32, 64)].into_iter().chain(others) {
                let [k, v] = [1, 2].map(|seed| random(&[2, 4, 6000, d], dtype, &device, seed));
                let cache = cache(&k, &v);
                let steps = 40;
                let queries: Vec<Vec<_>> = (0..2)
                    .map(|t| (0..steps).map(|i| random(&[2, 8, 1, d], dtype, &device, 100 * (t + 1) + i)).collect())
                    .collect();
                let step = &|q: &Tensor| cache.attend(q, 0.3, KvBudget::new(500)).unwrap();
                let want: Vec<Vec<_>> = queries.iter().map(|q| q.iter().map(|q| bits(&step(q))).collect()).collect();
                device.synchronize().unwrap();
                thread::scope(|scope| {
                    for (queries, want) in queries.iter().zip(&want) {
                        scope.spawn(move || {
                            for _ in 0..5 {
                                let outputs: Vec<_> = queries.iter().map(step).collect();
                                for (i, (got, want)) in outputs.iter().zip(want).enumerate() {
                                    assert!(&bits(got) == want, "step {i} of {dtype:?} {d}, own stream: {own_stream}");
                                }
                            }
                        });
                    }
                });
            }
        }
    }

    /// A fit that is prepared on one thread, run on others and read on others still, as a runtime moves it.
    #[test]
    fn a_prepared_fit_moves_between_threads() {
        let Some(_turn) = asked_for() else { return };
        for own_stream in [false, true] {
            let device = if own_stream { Device::new_cuda_with_stream(0) } else { Device::new_cuda(0) }.unwrap();
            for (dtype, shape, k, metric) in [
                (DType::F32, [1, 200_000, 32], 64, Metric::SquaredEuclidean),
                (DType::F16, [8, 2048, 64], 64, Metric::SquaredEuclidean),
                (DType::BF16, [2, 30_000, 33], 200, Metric::Cosine),
                (DType::F64, [3, 20_000, 8], 16, Metric::Manhattan),
            ] {
                let settings = KMeans::new(k).metric(metric).init(Init::Even).max_iters(6).check_finite(false);
                let inputs: Vec<_> = (0..4).map(|seed| random(&shape, dtype, &device, 10 + seed)).collect();
                let want: Vec<Fit> = inputs.iter().map(|x| settings.fit(x).unwrap()).collect();
                device.synchronize().unwrap();
                let device = &device;
                let mut prepared = elsewhere(|| settings.prepare(&shape[..], dtype, device).unwrap());
                for (x, want) in inputs.iter().zip(&want) {
                    let what = format!("{dtype:?} {shape:?}, own stream: {own_stream}");
                    prepared = elsewhere(|| {
                        keep_busy(device);
                        prepared.run(x).unwrap();
                        prepared
                    });
                    assert_same(prepared.labels(), &want.labels, &what);
                    elsewhere(|| assert_same(prepared.centroids(), &want.centroids, &what));
                    elsewhere(|| assert_same_fit(&prepared.fit().unwrap(), want, &what));
                    // From the run of another thread into a run of this one.
                    prepared = elsewhere(|| {
                        keep_busy(device);
                        prepared.run(&inputs[0]).unwrap();
                        prepared
                    });
                    prepared.run(x).unwrap();
                    assert_same_fit(&prepared.fit().unwrap(), want, &what);
                }
            }
        }
    }

    /// A capture of a stream of its own goes on while other threads take over from each other on theirs.
    #[test]
    fn a_capture_outlives_the_waits_of_other_threads() {
        let Some(_turn) = asked_for() else { return };
        let (captured, shared) = (Device::new_cuda_with_stream(0).unwrap(), Device::new_cuda(0).unwrap());
        // SAFETY: each thread's work is on one stream, and what it takes over is waited for.
        unsafe { captured.as_cuda_device().unwrap().disable_event_tracking() };
        let settings = KMeans::new(16).init(Init::Even).max_iters(5).check_finite(false);
        let [x, y] = [(&captured, 30), (&shared, 31)].map(|(on, seed)| random(&[3, 900, 40], DType::F16, on, seed));
        let want = [&x, &y].map(|rows| settings.fit(rows).unwrap());
        let [mut fit, mut moved] =
            [&captured, &shared].map(|on| settings.prepare(&[3, 900, 40][..], DType::F16, on).unwrap());
        fit.run(&x).unwrap();
        moved.run(&y).unwrap();
        for device in [&captured, &shared] {
            device.synchronize().unwrap();
        }
        let stream = captured.as_cuda_device().unwrap().cuda_stream();
        stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).unwrap();
        let mut moved = elsewhere(|| {
            moved.run(&y).unwrap();
            moved
        });
        fit.run(&x).unwrap();
        elsewhere(|| {
            moved.run(&y).unwrap();
            assert_same_fit(&moved.fit().unwrap(), &want[1], "another thread's");
            drop(moved);
        });
        let free = CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
        let graph = stream.end_capture(free).unwrap().expect("a graph of what was captured");
        graph.launch().unwrap();
        assert_same_fit(&fit.fit().unwrap(), &want[0], "the captured one");
    }

    /// A fit that is dropped on another thread than the one whose work with it is under way: nobody gets its memory before.
    #[test]
    fn memory_is_free_when_all_threads_are_done() {
        let Some(_turn) = asked_for() else { return };
        let device = &Device::new_cuda(0).unwrap();
        let (n, d, k) = (300_000, 16, 64);
        let x = &random(&[n, d], DType::F32, device, 20);
        let settings = KMeans::new(k).init(Init::Even).max_iters(4).tol(0.0).check_finite(false);
        for turn in 0..3 {
            let mut prepared = settings.prepare((n, d), DType::F32, device).unwrap();
            prepared.run(x).unwrap();
            device.synchronize().unwrap();
            let (prepared, routed) = elsewhere(|| {
                let mut routed = RoutedAttention::new(KeyBudget::Share(0.1));
                let q = x.narrow(0, 0, 4 * 2048 * 4).unwrap().reshape((1, 4, 2048, 64)).unwrap();
                let q = q.to_dtype(DType::F16).unwrap();
                routed.forward(&q, &q, &q, 0.1).unwrap();
                device.synchronize().unwrap();
                keep_busy(device);
                routed.forward(&q, &q, &q, 0.1).unwrap();
                prepared.run(x).unwrap();
                (prepared, routed)
            });
            match turn {
                0 => drop((prepared, routed)),
                1 => drop((routed, prepared.into_fit().unwrap())),
                _ => elsewhere(|| drop((prepared, routed))),
            }
            // The pool is likely to hand out next what has just been freed.
            let sizes = [n, k * d, n * 2, k, 4 * 2048, 1 << 20].map(|size| vec![size; 4]).concat();
            let filled = sizes.iter().map(|&size| Tensor::full(7u32, size, device).unwrap()).collect::<Vec<_>>();
            device.synchronize().unwrap();
            // The other thread's stream is not this device's in this thread.
            device.as_cuda_device().unwrap().cuda_stream().context().synchronize().unwrap();
            for t in filled {
                assert!(u32s(&t).iter().all(|&v| v == 7), "turn {turn}: {} elements", t.elem_count());
            }
        }
    }

    /// A cache is filled, clustered and read by threads that take turns, and so are the other layers with a state.
    #[test]
    fn layers_move_between_threads() {
        let Some(_turn) = asked_for() else { return };
        for own_stream in [false, true] {
            let device = &if own_stream { Device::new_cuda_with_stream(0) } else { Device::new_cuda(0) }.unwrap();
            let of = |tokens: usize, seed: u64| random(&[1, 4, tokens, 64], DType::F16, device, seed);
            let (prompt, q) = ([of(4000, 30), of(4000, 31)], random(&[1, 8, 1, 64], DType::F16, device, 32));
            let next: Vec<_> = (0..6).map(|i| [of(100, 40 + i), of(100, 50 + i)]).collect();
            let rows: Vec<_> = (0..6).map(|i| random(&[3000, 16], DType::F32, device, 60 + i)).collect();
            let long: Vec<_> = (0..4).map(|i| random(&[1, 4, 3000, 64], DType::F16, device, 70 + i)).collect();
            device.synchronize().unwrap();

            let first = KMeans::new(32).init(Init::Even).max_iters(3).fit(&rows[0]).unwrap();
            let codebook = || Codebook::new(&first.centroids, Metric::SquaredEuclidean).unwrap();
            let layers = || {
                (
                    ClusteredKvCache::new(2000),
                    MiniBatch::from_fit(&first).unwrap(),
                    EmaCodebook::new(codebook(), Ema { threshold_ema_dead_code: 1.0, ..Ema::default() }).unwrap(),
                    RoutedAttention::new(KeyBudget::Share(0.2)),
                )
            };
            // All results of a sequence of steps, each done and read by way of `run` and `read`.
            let sequence = |apart: bool| {
                fn maybe<R: Send>(apart: bool, f: impl FnOnce() -> R + Send) -> R {
                    if apart {
                        elsewhere(f)
                    } else {
                        f()
                    }
                }
                let (mut cache, mut batch, mut ema, mut routed) = layers();
                let mut results: Vec<Vec<u64>> = vec![];
                device.synchronize().unwrap();
                (cache, batch, ema, routed) = maybe(apart, || {
                    if apart {
                        keep_busy(device);
                    }
                    cache.append(&prompt[0], &prompt[1]).unwrap();
                    (cache, batch, ema, routed)
                });
                cache.cluster().unwrap();
                for (i, [k, v]) in next.iter().enumerate() {
                    (cache, batch, ema, routed) = maybe(apart, || {
                        if apart {
                            keep_busy(device);
                        }
                        cache.append(k, v).unwrap();
                        cache.cluster().unwrap();
                        batch.step(&rows[i]).unwrap();
                        ema.step(&rows[i]).unwrap();
                        let x = &long[i % long.len()];
                        routed.forward(x, x, x, 0.2).unwrap();
                        (cache, batch, ema, routed)
                    });
                    let x = &long[(i + 1) % long.len()];
                    results.extend([
                        bits(&cache.attend(&q, 0.2, KvBudget::new(300)).unwrap()),
                        bits(&cache.k().unwrap().unwrap().contiguous().unwrap()),
                        bits(&cache.clusters().unwrap().mean_values.scales),
                        bits(&batch.centroids().unwrap()),
                        bits(batch.counts()),
                        bits(ema.codebook().centroids()),
                        bits(&routed.forward(x, x, x, 0.2).unwrap()),
                    ]);
                    // Rolled back and written over while the read of another thread may be under way.
                    let length = cache.current_seq_len();
                    if i % 2 == 1 {
                        cache.truncate(length - 10).unwrap();
                        let [k, v] = [k, v].map(|t| t.narrow(2, 0, 10).unwrap().contiguous().unwrap());
                        cache.append(&v, &k).unwrap();
                    }
                }
                cache.reset();
                results
            };
            let (together, apart) = (sequence(false), sequence(true));
            for (i, (a, b)) in together.iter().zip(&apart).enumerate() {
                assert!(a == b, "result {i}, own stream: {own_stream}");
            }
        }
    }

    /// Scratch goes with the tensors: two streams of one GPU take turns with the same layers.
    #[test]
    fn two_streams_share_layers() {
        let Some(_turn) = asked_for() else { return };
        let plain = Device::new_cuda(0).unwrap();
        let devices = [(); 2].map(|_| Device::new_cuda_with_stream(0).unwrap());
        take_turns(&[devices[0].clone(), devices[1].clone(), plain]);
    }

    #[test]
    fn two_gpus_share_layers() {
        let Some(_turn) = asked_for() else { return };
        let Some(devices) = two_gpus("two_gpus_share_layers") else { return };
        take_turns(&devices);
        take_turns(&[Device::new_cuda_with_stream(1).unwrap(), devices[0].clone(), devices[1].clone()]);
    }

    /// A copy from one GPU to another is complete before the other one works with it, whatever the first still has to do.
    #[test]
    fn two_gpus_hand_each_other_tensors() {
        let Some(_turn) = asked_for() else { return };
        let Some([a, b]) = two_gpus("two_gpus_hand_each_other_tensors") else { return };
        let x = &random(&[3000, 40], DType::F32, &Device::Cpu, 11);
        let settings = || KMeans::new(300).tol(0.0).max_iters(3);
        let want = settings().fit(x).unwrap();
        let on = [&a, &b].map(|device| x.to_device(device).unwrap());
        let fit = settings().fit(&on[0]).unwrap();
        a.synchronize().unwrap();
        for turn in 0..3 {
            keep_busy(&a);
            let labels = fit.to_device(&b).unwrap().predict(&on[1]).unwrap();
            assert_same(&labels, &want.labels, &format!("labels on the other GPU, turn {turn}"));
            // A stream starts from centroids wherever they are.
            keep_busy(&a);
            let given = settings().init(Init::Given(fit.centroids.clone())).max_iters(0);
            let source = Source::from_tensor(x).unwrap();
            let stays = given.fit_stream(&source, &StreamOptions::new(&b)).unwrap();
            assert_same(&stays.labels, &want.labels, &format!("labels of a stream, turn {turn}"));
        }
        // Sums of ranks meet in memory where there is no NCCL.
        thread::scope(|scope| {
            for turn in 0..6 {
                let (settings, want) = (settings(), &want);
                scope.spawn(move || {
                    for _ in 0..4 {
                        let fit = settings.clone().devices(Devices::These(vec![0, 1])).fit(x).unwrap();
                        assert_same_fit(&fit, want, &format!("a fit of two GPUs, thread {turn}"));
                    }
                });
            }
        });
    }

    /// The same layers on one device after another give what new ones give.
    fn take_turns(devices: &[Device]) {
        let heads = |device: &Device, seed: u64| random(&[1, 4, 2048, 64], DType::F16, device, seed);
        let mut routed = RoutedAttention::new(KeyBudget::Share(0.1));
        let mut kept = ClusteredKvCache::new(4096);
        for turn in 0..6 {
            let device = &devices[turn % devices.len()];
            let [q, k, v] = [0, 1, 2].map(|i| heads(device, 80 + 3 * turn as u64 + i));
            // The last device is still at work with the memory when this one gets it.
            keep_busy(device);
            let got = routed.forward(&q, &k, &v, 0.2).unwrap();
            let want = RoutedAttention::new(KeyBudget::Share(0.1)).forward(&q, &k, &v, 0.2).unwrap();
            assert_same(&got, &want, &format!("routed attention, turn {turn}"));

            kept.reset();
            kept.append(&k, &v).unwrap();
            kept.cluster().unwrap();
            let one = random(&[1, 8, 1, 64], DType::F16, device, 99);
            let got = kept.attend(&one, 0.2, KvBudget::new(200)).unwrap();
            let want = cache(&k, &v).attend(&one, 0.2, KvBudget::new(200)).unwrap();
            assert_same(&got, &want, &format!("cache, turn {turn}"));
        }
        // Threads that have never asked for a device, and one that is bound to another one.
        for (i, device) in devices.iter().enumerate() {
            let x = &random(&[3, 700, 40], DType::F16, &Device::Cpu, 7);
            let want = &KMeans::new(9).init(Init::KMeansPlusPlus).fit(x).unwrap();
            let on_device = &x.to_device(device).unwrap();
            device.synchronize().unwrap();
            let bind = &devices[(i + 1) % devices.len()];
            for bound in [false, true] {
                elsewhere(|| {
                    if bound {
                        bind.synchronize().unwrap();
                    }
                    let settings = KMeans::new(9).init(Init::KMeansPlusPlus);
                    assert_same_fit(&settings.fit(on_device).unwrap(), want, &format!("device {i}, bound: {bound}"));
                    let labels =
                        assign(on_device, &want.centroids.to_device(device).unwrap(), Metric::default()).unwrap();
                    assert_same(&labels, &want.labels, "labels");
                });
            }
        }
    }

    /// A tensor on another device is refused by name: a second stream of the same GPU is one.
    #[test]
    fn other_devices_are_refused() {
        let Some(_turn) = asked_for() else { return };
        let (here, there) = (Device::new_cuda(0).unwrap(), Device::new_cuda_with_stream(0).unwrap());
        refuses(&here, &there);
        refuses(&here, &Device::Cpu);
        if let Some([a, b]) = two_gpus("other_devices_are_refused, of two GPUs") {
            refuses(&a, &b);
        }
    }

    fn refuses(here: &Device, there: &Device) {
        #[track_caller]
        fn refused<T>(argument: &str, got: Result<T, Error>) {
            match got {
                Err(Error::Device { argument: named, .. }) => assert_eq!(named, argument),
                Err(other) => panic!("{argument}: {other}"),
                Ok(_) => panic!("{argument}: taken"),
            }
        }
        let [x, y] = [here, there].map(|device| random(&[200, 16], DType::F32, device, 1));
        let [c, e] = [&x, &y].map(|t| t.narrow(0, 0, 8).unwrap().contiguous().unwrap());
        let [l, m] = [&x, &y].map(|t| Tensor::zeros(200, DType::U32, t.device()).unwrap());
        let metric = Metric::SquaredEuclidean;
        refused("centroids", assign(&x, &e, metric));
        refused("centroids", assign_with_distances(&x, &e, metric));
        refused("centroids", quantize(&x, &e, metric));
        refused("centroids", top_rows_per_centroid(&x, &e, 2, metric));
        refused("labels", cluster_means(&x, &m, 3));
        refused("labels", cluster_sums(&x, &m, 3));
        refused("labels", residuals(&x, &c, &m));
        refused("centroids", residuals(&x, &e, &l));
        let scores = Tensor::zeros((5, 8), DType::F32, here).unwrap();
        let sizes = |device: &Device| Tensor::ones(8, DType::U32, device).unwrap();
        refused("sizes", select_clusters(&scores, &sizes(there), ClusterBudget::Within(3)));
        let taken = select_clusters(&scores, &sizes(here), ClusterBudget::Within(3)).unwrap();
        let (order, offsets) = sort_by_cluster(&l, 8).unwrap();
        let [far_order, far_offsets] =
            [&order, &offsets].map(|t| t.to_device(&Device::Cpu).unwrap().to_device(there).unwrap());
        refused("order", taken.indices(&far_order, &offsets, 4));
        refused("offsets", taken.indices(&order, &far_offsets, 4));

        let fit = KMeans::new(8).fit(&x).unwrap();
        let other = KMeans::new(8).fit(&y).unwrap();
        let given = KMeans::new(8).init(Init::Given(e.clone())).fit(&x);
        assert!(matches!(given, Err(Error::Device { .. })), "{given:?}");
        let weights = Tensor::ones(200, DType::F32, there).unwrap();
        refused("sample_weights", KMeans::new(8).sample_weights(&weights).fit(&x));
        let lengths = Tensor::new(&[200u32], there).unwrap();
        refused("lengths", KMeans::new(8).lengths(&lengths).fit(&x.unsqueeze(0).unwrap()));
        refused("x", KMeans::new(8).prepare((200, 16), DType::F32, here).unwrap().run(&y));
        refused("x", fit.predict(&y));
        refused("x", fit.transform(&y));
        refused("x", MiniBatch::from_fit(&fit).unwrap().step(&y));
        refused("fit", Segments::from_fit(&fit).unwrap().append(&other));

        let codebook = Codebook::new(&c, metric).unwrap();
        refused("centroids", codebook.encode(&y));
        refused("codes", codebook.decode(&m));
        refused("codes", codebook.usage(&m));
        refused("centroids", codebook.commitment_loss(&y));
        refused("centroids", EmaCodebook::new(codebook, Ema::default()).unwrap().step(&y));
        let pq = ProductQuantizer::train(&x, 2, &KMeans::new(8)).unwrap();
        refused("centroids", pq.encode(&y));

        let [q, k] = [here, there].map(|device| random(&[1, 2, 300, 64], DType::F32, device, 2));
        let mut cache = cache(&q, &q);
        refused("k", cache.append(&k, &k));
        refused("v", cache.append(&q, &k));
        refused("q", cache.attend(&k.narrow(2, 0, 1).unwrap(), 0.1, KvBudget::new(10)));
        let mut fresh = ClusteredKvCache::new(300);
        fresh.append(&q, &q).unwrap();
        let waiting = 300 - 64 - 4;
        refused("labels", fresh.group(&Tensor::zeros((1, 2, waiting), DType::U32, there).unwrap(), 3));
        let mut far = ClusteredKvCache::new(300);
        far.append(&k, &k).unwrap();
        refused("layers", ClusteredKvCache::cluster_layers([&mut fresh, &mut far]));
        let mut routed = RoutedAttention::new(KeyBudget::Tokens(20));
        refused("k", routed.forward(&q, &k, &q, 0.1));
        refused("v", routed.forward(&q, &q, &k, 0.1));
        // And all of it goes on as before.
        assert_same_fit(&KMeans::new(8).fit(&x).unwrap(), &fit, "after refusals");
        routed.forward(&q, &q, &q, 0.1).unwrap();
        cache.attend(&q.narrow(2, 0, 1).unwrap(), 0.1, KvBudget::new(10)).unwrap();
    }

    /// A capture finds the copied rows of a run, and its input, where they were: nothing from outside is freed in it.
    #[test]
    fn copied_rows_are_captured() {
        let Some(_turn) = asked_for() else { return };
        let device = Device::new_cuda_with_stream(0).unwrap();
        let gpu = device.as_cuda_device().unwrap();
        // SAFETY: everything here runs on one stream.
        unsafe { gpu.disable_event_tracking() };
        let stream = gpu.cuda_stream();
        // Shapes as they lie in memory, and which of their dimensions change places.
        for (dtype, laid, swapped, k, iters) in [
            (DType::BF16, vec![2, 500, 33], None, 9, 6),
            (DType::F16, vec![2, 33, 500], Some((1, 2)), 9, 6),
            (DType::F32, vec![2, 24, 500], Some((1, 2)), 9, 6),
            (DType::F16, vec![4, 3, 300, 40], Some((0, 1)), 7, 6),
            (DType::F32, vec![2, 500, 24], None, 9, 6),
            (DType::F64, vec![2, 7, 300], Some((1, 2)), 5, 300),
        ] {
            let view = |t: &Tensor| swapped.map_or(t.clone(), |(a, b)| t.transpose(a, b).unwrap());
            let settings = KMeans::new(k).init(Init::Even).max_iters(iters).tol(0.0).check_finite(false);
            let inputs: Vec<_> = (0..5).map(|seed| random(&laid, dtype, &device, 200 + seed)).collect();
            let want: Vec<_> = inputs.iter().map(|x| settings.fit(&view(x)).unwrap()).collect();
            let mut prepared = settings.prepare(view(&inputs[0]).shape(), dtype, &device).unwrap();
            // The first run's input is nobody else's, so that the second run has the last handle to it.
            prepared.run(&view(&inputs[1].copy().unwrap())).unwrap();
            let x = inputs[0].copy().unwrap();
            device.synchronize().unwrap();
            stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).unwrap();
            prepared.run(&view(&x)).unwrap();
            let free = CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
            let graph = stream.end_capture(free).unwrap().expect("a graph of what was captured");
            for replay in 0..50 {
                let at = replay * 3 % inputs.len();
                x.slice_set(&inputs[at], 0, 0).unwrap();
                graph.launch().unwrap();
                let what = format!("{dtype:?} {laid:?}, replay {replay}");
                assert_same_fit(&prepared.fit().unwrap(), &want[at], &what);
            }
            device.synchronize().unwrap();
            drop((graph, prepared, x));
            assert_same_fit(&settings.fit(&view(&inputs[2])).unwrap(), &want[2], "after the graph");
        }
    }

    /// A capture refuses by name what it cannot have, and ends as if nothing had been.
    #[test]
    fn captures_refuse_what_they_cannot_have() {
        let Some(_turn) = asked_for() else { return };
        let free = CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
        let own = Device::new_cuda_with_stream(0).unwrap();
        // SAFETY: everything here runs on one stream.
        unsafe { own.as_cuda_device().unwrap().disable_event_tracking() };
        let settings = KMeans::new(5).init(Init::Even).tol(0.0).check_finite(false);
        let capture = |device: &Device, f: &mut dyn FnMut()| {
            let stream = device.as_cuda_device().unwrap().cuda_stream();
            device.synchronize().unwrap();
            stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).unwrap();
            f();
            stream.end_capture(free).unwrap()
        };

        // A first run allocates what is kept.
        let x = random(&[2, 300, 7], DType::F64, &own, 1);
        let want = settings.clone().max_iters(3).fit(&x).unwrap();
        let mut first = settings.clone().max_iters(3).prepare(x.shape(), DType::F64, &own).unwrap();
        capture(&own, &mut || {
            assert!(matches!(first.run(&x), Err(Error::Conflict { argument: "stream", .. })));
        });
        first.run(&x).unwrap();
        assert_same_fit(&first.fit().unwrap(), &want, "after a refusal");

        // A graph holds every iteration.
        let mut endless = settings.clone().max_iters(usize::MAX).prepare(x.shape(), DType::F64, &own).unwrap();
        endless.run(&x).unwrap();
        let converged = endless.fit().unwrap();
        capture(&own, &mut || assert!(matches!(endless.run(&x), Err(Error::TooLarge { .. }))));
        endless.run(&x).unwrap();
        assert_same_fit(&endless.fit().unwrap(), &converged, "after a refusal");

        // A graph cannot wait for what another thread has queued.
        let device = &Device::new_cuda(0).unwrap();
        let x = &random(&[2, 300, 7], DType::F64, device, 1);
        device.synchronize().unwrap();
        let mut moved = elsewhere(|| {
            let mut prepared = settings.clone().max_iters(3).prepare(x.shape(), DType::F64, device).unwrap();
            prepared.run(x).unwrap();
            prepared
        });
        capture(device, &mut || {
            assert!(matches!(moved.run(x), Err(Error::Conflict { argument: "stream", .. })));
        });
        moved.run(x).unwrap();
        let graph = capture(device, &mut || moved.run(x).unwrap()).expect("a graph of what was captured");
        graph.launch().unwrap();
        assert_same_fit(&moved.fit().unwrap(), &want, "captured on the thread of the last run");
    }

    /// Where fewer blocks run at once than a fit in one launch has, it is a fit in many: the same bits.
    #[test]
    fn teams_that_do_not_fit_are_not_launched() {
        let Some(_turn) = asked_for() else { return };
        let device = Device::new_cuda(0).unwrap();
        for weighted in [false, true] {
            let x = random(&[4, 4096, 64], DType::F16, &device, 3);
            let mut settings = KMeans::new(32).init(Init::Even).max_iters(5);
            if weighted {
                settings = settings.sample_weights(&random(&[4096], DType::F32, &device, 4).abs().unwrap());
            }
            let run = |limit| {
                testing::limit_blocks_at_once(limit);
                testing::launches();
                let fit = settings.fit(&x).unwrap();
                testing::limit_blocks_at_once(None);
                (fit, testing::launches().iter().any(|l| l.starts_with("fit_resident")))
            };
            let ((whole, one), (parts, few)) = (run(None), run(Some(1)));
            assert!(one && !few, "{one} {few}");
            assert_same_fit(&whole, &parts, &format!("weighted: {weighted}"));
        }
    }
}
