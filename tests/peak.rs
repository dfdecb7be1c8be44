//! A fit on a GPU takes no more memory than its plan says. (A test of its own: others would use the same pool.)
#![cfg(feature = "cuda")]

mod common;

use candle_core::{cuda_backend::cudarc::driver::sys, DType, Device, Tensor};
use candle_flash_kmeans::{EmptyClusters, Init, KMeans};
use common::*;

/// No fit takes more memory than its plan says, and only the first run of a prepared one takes any.
#[test]
fn peak_is_within_the_plan() {
    if !devices().iter().any(Device::is_cuda) {
        return;
    }
    let device = Device::new_cuda(0).unwrap();
    let used = |attribute, reset: bool| {
        let context = device.as_cuda_device().unwrap().cuda_stream().context().clone();
        let (mut pool, mut bytes) = (std::ptr::null_mut(), 0u64);
        device.synchronize().unwrap();
        // SAFETY: the device is in use, and these attributes are a u64.
        unsafe {
            sys::cuDeviceGetDefaultMemPool(&mut pool, context.cu_device()).result().unwrap();
            if reset {
                sys::cuMemPoolSetAttribute(pool, attribute, (&raw mut bytes).cast()).result().unwrap();
            }
            sys::cuMemPoolGetAttribute(pool, attribute, (&raw mut bytes).cast()).result().unwrap();
        }
        bytes
    };
    let peak = || used(sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH, false);
    let reset = || used(sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH, true);
    let mut rng = rng(87);
    let mut wrong = vec![];
    for (b, n, k, d) in [
        (1, 500_000, 300, 64),
        (1, 900_000, 5000, 128),
        (40, 5_000, 64, 33),
        (300, 1000, 20, 4),
        (1, 100_000, 20_000, 16),
    ] {
        for (metric, dtype) in METRICS.into_iter().zip([DType::F16, DType::F32, DType::BF16, DType::F64]) {
            let x = uniform(&[b, n, d], 0.0, 1.0, dtype, &mut rng).to_device(&device).unwrap();
            let weights = uniform(&[n], 1.0, 1.0, DType::F64, &mut rng).to_device(&device).unwrap();
            let given = Init::Given(x.narrow(1, 0, k).unwrap());
            let plain = KMeans::new(k).metric(metric).max_iters(2).init(given);
            let lengths = Tensor::full(n as u32 - 1, b, &device).unwrap();
            let weighted = plain.clone().sample_weights(&weights);
            // One centroid on all of the rows' near side: the others are empty and have to move.
            let far = x.narrow(1, 0, k).unwrap().affine(1.0, 100.0).unwrap();
            let relocated = plain.clone().empty_clusters(EmptyClusters::Relocate).init(Init::Given(far));
            // Equal rows, and one far from all others: what is left to recheck.
            let ties = x.narrow(1, 0, 1).unwrap().broadcast_as(x.shape()).unwrap().contiguous().unwrap();
            let outlier =
                Tensor::cat(&[x.narrow(1, 0, n - 1).unwrap(), x.narrow(1, 0, 1).unwrap().affine(3e3, 0.0).unwrap()], 1);
            let outlier = outlier.unwrap().contiguous().unwrap();
            let all = [
                (plain.clone(), &x, "plain"),
                (plain.clone().max_iters(5), &x, "longer"),
                (weighted.clone(), &x, "weighted"),
                (plain.clone().lengths(&lengths), &x, "ragged"),
                (plain.clone(), &ties, "ties"),
                (plain.clone().init(Init::Even), &outlier, "outlier"),
                (plain.clone().init(Init::Random).n_init(3), &x, "restarted"),
                (weighted.clone().init(Init::Random).n_init(2), &x, "weighted, restarted"),
                (relocated, &x, "relocated"),
                (plain.clone().init(Init::KMeansPlusPlus), &x, "k-means++"),
                (plain.clone().init(Init::KMeansPlusPlus).n_init(2), &x, "k-means++, restarted"),
                (plain.clone().init(Init::KMeansParallel), &x, "k-means||"),
                (weighted.clone().init(Init::KMeansParallel), &x, "weighted k-means||"),
            ];
            // These read rows to the host, or pass over them for each centroid.
            let slow = |what: &str| ["k-means++", "k-means||", "relocated"].iter().any(|slow| what.contains(slow));
            for (settings, x, what) in all.into_iter().filter(|c| b * k <= 2560 || !slow(c.2)) {
                let before = reset();
                drop(settings.fit(x).unwrap());
                let (took, plan) = (peak() - before, settings.plan(x).unwrap());
                let line = format!("{what}: {took} bytes at {b} {n} {k} {d} {metric:?} {dtype:?}: {plan}");
                println!("{line}");
                // Where blocks of one launch do it all, only this kernel's memory is taken.
                let of_use = took * 8 >= plan.bytes || what == "ties";
                if took > plan.bytes || !of_use {
                    wrong.push(line);
                }
                let bound = (8 + 4 + 8) * b * n + b * k * d * 3 * 8;
                println!("    of 8 bytes a row and three f64 accumulators: {:.2}", took as f64 / bound as f64);
            }
            let plain = plain.check_finite(false).tol(0.0);
            let mut prepared = plain.prepare(x.shape(), dtype, &device).unwrap();
            prepared.run(&x).unwrap();
            let before = reset();
            prepared.run(&x).unwrap();
            println!("    again: {} bytes", peak() - before);
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
