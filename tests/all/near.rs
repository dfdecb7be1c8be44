//! Fits that score near groups of centroids alone have the bits of fits that score all: on a GPU `cuda/assign/near.rs`, on a CPU its own
//! groups. (`skipping` has more fits, of rows of all types.)

use crate::{common::*, skipping::assert_same_on};
use candle_core::{DType, Device, Tensor};
use candle_flash_kmeans::{Init, KMeans};

const HALVES: [DType; 2] = [DType::F16, DType::BF16];

/// Rows that fill tiles but for the last one. A CPU has fewer of them to compare.
fn rows(device: &Device) -> usize {
    if device.is_cuda() {
        20_011
    } else {
        2_011
    }
}

fn given(start: &Tensor, device: &Device) -> Init {
    Init::Given(start.to_device(device).unwrap())
}

/// Mixtures of fewer clusters than there are centroids, which share them out for many iterations; and rows without any cluster.
#[test]
fn groups_are_made_anew() {
    let mut rng = rng(100);
    for (device, dtype) in devices().iter().flat_map(|device| HALVES.map(|dtype| (device, dtype))) {
        for (k, d) in [300, 700].into_iter().flat_map(|k| [8, 50, 64, 128].map(|d| (k, d))) {
            let settings = KMeans::new(k).max_iters(40).tol(0.0).init(Init::Even);
            let x = blobs(&[rows(device), d], k / 8, dtype, &mut rng);
            assert_same_on(device, &settings, &x, &format!("mixture {dtype:?} {k} {d}"));
            if d == 8 {
                let x = uniform(&[rows(device), d], 0.0, 1.0, dtype, &mut rng);
                assert_same_on(device, &settings.max_iters(26), &x, &format!("uniform {dtype:?} {k} {d}"));
            }
        }
    }
}

/// Fits that stop at thresholds, before and after groups are made: what is queued beyond that does nothing.
#[test]
fn groups_end_with_their_fit() {
    let mut rng = rng(101);
    for (device, (dtype, d)) in
        devices().iter().flat_map(|device| [(DType::F16, 40), (DType::BF16, 128)].map(|t| (device, t)))
    {
        let x = blobs(&[rows(device), d], 25, dtype, &mut rng);
        let settings = KMeans::new(200).max_iters(60).init(Init::Even);
        let mut ends = vec![];
        for tol in [0.0, 1e-4, 1e-3, 1e-2, 1e-1] {
            let fit = assert_same_on(device, &settings.clone().tol(tol), &x, &format!("tol {tol} {dtype:?}"));
            ends.push(u32s(&fit.n_iter)[0]);
        }
        assert!(ends.is_sorted_by(|a, b| a >= b) && ends[4] < ends[0], "{ends:?}");
        // Assignments before the first groups, and the first with them.
        for max_iters in 1..6 {
            let settings = settings.clone().tol(0.0).max_iters(max_iters);
            assert_same_on(device, &settings, &x, &format!("{max_iters} iterations {dtype:?}"));
        }
    }
}

/// Two equal centroids, of which the second is no row's until the first has moved away; and rows that are all the same.
#[test]
fn groups_know_equal_centroids() {
    let mut rng = rng(102);
    for (device, (dtype, d)) in
        devices().iter().flat_map(|device| HALVES.map(|t| [8, 64].map(|d| (device, (t, d))))).flatten()
    {
        let x = blobs(&[rows(device), d], 60, dtype, &mut rng);
        let part = |first, count| x.narrow(0, first, count).unwrap();
        let settings = KMeans::new(260).max_iters(26).tol(0.0);
        let (first, pair) = (part(0, 130), part(7, 1));
        for (others, what) in
            [(vec![part(0, 130)], "each twice"), (vec![part(130, 128), pair.clone(), pair.clone()], "a pair")]
        {
            let start = Tensor::cat(&[vec![first.clone()], others].concat(), 0).unwrap();
            let settings = settings.clone().init(given(&start, device));
            assert_same_on(device, &settings, &x, &format!("{what} {dtype:?} {d}"));
        }
        let settings = settings.init(Init::Even);
        let equal = pair.broadcast_as(x.shape()).unwrap().contiguous().unwrap();
        assert_same_on(device, &settings, &equal, &format!("equal rows {dtype:?} {d}"));
        let two = Tensor::cat(&[&equal, &part(900, 1)], 0).unwrap();
        assert_same_on(device, &settings, &two, &format!("two rows {dtype:?} {d}"));
    }
}

/// A row and a centroid far from all others; rows that are no numbers; and rows whose mean is far from the origin.
#[test]
fn groups_hold_for_hostile_rows() {
    let mut rng = rng(103);
    for (device, (dtype, d)) in
        devices().iter().flat_map(|device| HALVES.map(|t| [8, 50, 128].map(|d| (device, (t, d))))).flatten()
    {
        let (n, k) = (rows(device), 300);
        let values = f64s(&blobs(&[n, d], 40, dtype, &mut rng));
        let settings = KMeans::new(k).max_iters(26).tol(0.0).check_finite(false);
        // Every so many rows are a centroid at the start, or those after the tenth.
        let (step, even) = (n / k, n / k * (k / 2));
        let with = |rows: &[usize], change: &dyn Fn(usize, f64) -> f64| {
            tensor(&[n, d], dtype, |i| if rows.contains(&(i / d)) { change(i % d, values[i]) } else { values[i] })
        };
        for (what, x) in [
            ("far", with(&[even, n - 1], &|_, v| 1000.0 * v)),
            ("rather far", with(&[3, even], &|_, v| 30.0 * v)),
            ("NaN", with(&[5, even, n - 2], &|column, v| if column == 1 { f64::NAN } else { v })),
            ("infinite", with(&[5, even, n - 2], &|column, v| if column == 1 { f64::INFINITY } else { v })),
            ("both", with(&[0, 9, n - 1], &|column, v| [f64::NAN, f64::NEG_INFINITY, v][column % 3])),
        ] {
            let all: Vec<_> = (0..k).map(|j| x.narrow(0, j * step, 1).unwrap()).collect();
            for (start, of) in [(Tensor::cat(&all, 0).unwrap(), "everywhere"), (x.narrow(0, 10, k).unwrap(), "first")] {
                let settings = settings.clone().init(given(&start, device));
                assert_same_on(device, &settings, &x, &format!("{what} {of} {dtype:?} {d}"));
            }
        }
        let off = uniform(&[n, d], 100.0, 1.0, dtype, &mut rng);
        assert_same_on(device, &settings.max_iters(40).init(Init::Even), &off, &format!("offset {dtype:?} {d}"));
    }
}

/// Rows that kernels cannot read where they lie, and columns of wider ones.
#[test]
fn groups_are_of_rows_in_any_layout() {
    let mut rng = rng(104);
    for (device, (dtype, d)) in
        devices().iter().flat_map(|device| HALVES.map(|t| [13, 64, 121].map(|d| (device, (t, d))))).flatten()
    {
        let settings = KMeans::new(150).max_iters(17).tol(0.0).init(Init::Even);
        let wide = blobs(&[rows(device), d + 8], 30, dtype, &mut rng).to_device(device).unwrap();
        for first in [0, 3, 8] {
            let x = wide.narrow(1, first, d).unwrap();
            assert_same_on(device, &settings, &x, &format!("from column {first} {dtype:?} {d}"));
        }
    }
}

/// Tiles, groups and digits of a sort that are one, whole and none of that.
#[test]
fn groups_are_of_any_number() {
    let mut rng = rng(105);
    for (n, k, d) in
        [(128, 128, 1), (191, 129, 16), (193, 191, 33), (385, 192, 128), (20_001, 4_200, 64), (9_000, 8_300, 16)]
    {
        // The last ones take a CPU longer than all others.
        for device in devices().iter().filter(|device| device.is_cuda() || k < 1000) {
            for dtype in HALVES {
                let x = blobs(&[n, d], 50, dtype, &mut rng);
                let settings = KMeans::new(k).max_iters(14).tol(0.0).init(Init::Even);
                assert_same_on(device, &settings, &x, &format!("{dtype:?} {n} {k} {d}"));
            }
        }
    }
}

#[cfg(feature = "cuda")]
mod cuda {
    use super::*;
    use crate::skipping::prepare_skipping;
    use candle_core::cuda_backend::cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
    use candle_flash_kmeans::{testing, Error};

    /// A GPU whose fits may score near groups alone, if there is one.
    fn hopper() -> Option<Device> {
        devices().into_iter().find(|device| testing::capability(device).unwrap() == 90)
    }

    /// Later assignments score fewer groups as centroids come to rest.
    #[test]
    fn later_assignments_score_near_groups_alone() {
        let Some(device) = hopper() else { return };
        let (n, k) = (50_000, 2048);
        for (dtype, d, name) in [(DType::F16, 16, "assign_near_1_f16"), (DType::BF16, 100, "assign_near_7_bf16")] {
            let x = blobs(&[n, d], 300, dtype, &mut rng(106)).to_device(&device).unwrap();
            let settings = KMeans::new(k).max_iters(30).tol(0.0).init(Init::Even);
            let mut fit = prepare_skipping(&settings, &[n, d], dtype, &device);
            assert!(fit.plan().to_string().contains("near groups"));
            let want = assert_same_on(&device, &settings, &x, "alone");
            testing::launches();
            fit.run(&x).unwrap();
            let near = testing::launches().iter().filter(|kernel| *kernel == name).count();
            assert_eq!(near, 31 - 3, "all but the first three");
            let scored = testing::scored_groups(&fit).unwrap().expect("groups") as f64;
            let all = (n.div_ceil(192) * k.div_ceil(64)) as f64;
            assert!(scored <= 0.5 * all, "{scored} of {all} groups, {dtype:?}");
            assert_same_fit(&fit.fit().unwrap(), &want, "prepared");
        }
    }

    /// No room for what assignments leave each other is an error, as for all else, and the next run has it.
    #[test]
    fn fits_without_room_for_groups_are_refused() {
        let Some(device) = hopper() else { return };
        let x = blobs(&[9000, 64], 50, DType::F16, &mut rng(107)).to_device(&device).unwrap();
        let settings = KMeans::new(300).max_iters(12).tol(0.0).init(Init::Even);
        let want = assert_same_on(&device, &settings, &x, "with room");
        for spared in 0.. {
            let mut fit = prepare_skipping(&settings, &[9000, 64], DType::F16, &device);
            testing::fail_allocation(Some(spared));
            let ran = fit.run(&x);
            if !testing::fail_allocation(None) {
                break;
            }
            assert!(matches!(ran, Err(Error::OutOfMemory { .. })), "{ran:?}");
            fit.run(&x).unwrap();
            assert!(testing::scored_groups(&fit).unwrap().is_some());
            assert_same_fit(&fit.fit().unwrap(), &want, "with room again");
        }
    }

    /// A run that is captured once makes groups of the rows of each replay.
    #[test]
    fn replays_make_groups_of_their_own() {
        if hopper().is_none() {
            return;
        }
        let device = Device::new_cuda_with_stream(0).unwrap();
        let gpu = device.as_cuda_device().unwrap();
        // SAFETY: everything here runs on one stream.
        unsafe { gpu.disable_event_tracking() };
        let (stream, mut rng) = (gpu.cuda_stream(), rng(108));
        for (dtype, n, k, d, tol) in [(DType::F16, 9001, 300, 64, 0.0), (DType::BF16, 5000, 520, 50, 1e-2)] {
            let settings = KMeans::new(k).max_iters(20).tol(tol).init(Init::Even).check_finite(false);
            let rows: Vec<_> = (0..4).map(|i| blobs(&[n, d], 20 << i, dtype, &mut rng)).collect();
            let rows: Vec<_> = rows.iter().map(|x| x.to_device(&device).unwrap()).collect();
            let want: Vec<_> = rows.iter().map(|x| assert_same_on(&device, &settings, x, "alone")).collect();
            let (x, mut fit) = (rows[0].copy().unwrap(), prepare_skipping(&settings, &[n, d], dtype, &device));
            fit.run(&x).unwrap();
            device.synchronize().unwrap();
            stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).unwrap();
            fit.run(&x).unwrap();
            let free = CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
            let graph = stream.end_capture(free).unwrap().expect("a graph of what was captured");
            for replay in 0..20 {
                let at = (replay * 7) % rows.len();
                x.slice_set(&rows[at], 0, 0).unwrap();
                graph.launch().unwrap();
                assert_same_fit(&fit.fit().unwrap(), &want[at], &format!("replay {replay} {dtype:?}"));
                assert!(tol > 0.0 || testing::scored_groups(&fit).unwrap().is_some(), "replay {replay} {dtype:?}");
            }
            device.synchronize().unwrap();
            drop((graph, fit, x));
        }
    }
}
