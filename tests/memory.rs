//! A fit on the CPU takes no more memory than its plan says.

mod common;

use candle_core::DType;
use candle_flash_kmeans::{Init, KMeans};
use common::*;
use std::{
    alloc::{GlobalAlloc, Layout, System},
    sync::atomic::{AtomicUsize, Ordering::SeqCst},
};

/// Counts the bytes in use and their peak.
struct Counting;

static USED: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: all calls are passed to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        PEAK.fetch_max(USED.fetch_add(layout.size(), SeqCst) + layout.size(), SeqCst);
        // SAFETY: the caller's obligations are those of the system's allocator.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, p: *mut u8, layout: Layout) {
        USED.fetch_sub(layout.size(), SeqCst);
        // SAFETY: as above.
        unsafe { System.dealloc(p, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

// One test, so that nothing else allocates meanwhile.
#[test]
fn peak_is_within_the_plan() {
    let mut rng = rng(71);
    for (b, n, k, d) in
        [(1, 100_000, 16, 8), (1, 20_000, 500, 64), (8, 5_000, 64, 32), (1, 4_000, 2_000, 200), (200, 1000, 20, 2)]
    {
        for (metric, dtype) in METRICS.into_iter().zip([DType::F32, DType::F16, DType::F64, DType::F32]) {
            let x = uniform(&[b, n, d], 0.0, 1.0, dtype, &mut rng);
            let weights = uniform(&[n], 1.0, 1.0, DType::F64, &mut rng);
            for settings in [KMeans::new(k).metric(metric), KMeans::new(k).metric(metric).sample_weights(&weights)] {
                let settings = settings.init(Init::Given(x.narrow(1, 0, k).unwrap())).max_iters(2);
                settings.fit(&x).unwrap();
                let before = USED.load(SeqCst);
                PEAK.store(before, SeqCst);
                let fit = settings.fit(&x).unwrap();
                let (took, plan) = (PEAK.load(SeqCst) - before, settings.plan(&x).unwrap());
                assert!(took as u64 <= plan.bytes, "{took} bytes at {b} {n} {k} {d} {metric:?} {dtype:?}: {plan}");
                assert!(
                    took as u64 * 10 >= plan.bytes,
                    "a bound of no use: {took} bytes at {b} {n} {k} {d} {metric:?} {dtype:?}: {plan}"
                );
                drop(fit);
            }
        }
    }
}
