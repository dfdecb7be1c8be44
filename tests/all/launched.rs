//! Processes that share a fit, one for each GPU, as launchers start them. With one GPU they are one, which goes through NCCL all the same.

use super::replicas::{check_sums, codebook_of_ranks, on_ranks};
use crate::common::*;
use candle_core::{cuda_backend::cudarc::driver::CudaContext, DType, Device, Tensor};
use candle_flash_kmeans::{
    nn::{ReplicaRank, Replicas},
    Devices, Error, Fit, Init, KMeans, Source, StoredType, StreamOptions,
};
use std::{
    env, fs, io,
    ops::Range,
    path::{Path, PathBuf},
    process::{self, Child, Command, Stdio},
    sync::atomic::{AtomicUsize, Ordering},
    thread,
    time::{Duration, Instant},
};

const ROLE: &str = "FLASH_KMEANS_LAUNCHED";
const OUT: &str = "FLASH_KMEANS_LAUNCHED_OUT";

fn rows() -> Tensor {
    blobs(&[1003, 7], 5, DType::F32, &mut rng(1))
}

fn settings() -> KMeans {
    KMeans::new(9).init(Init::KMeansPlusPlus).tol(0.0).max_iters(8)
}

/// The rows, from a function that does what the role says in the last of a few passes.
fn source(role: &str, rank: usize) -> Source<'static> {
    let x = rows();
    let bytes: Vec<u8> = f64s(&x).into_iter().flat_map(|v| (v as f32).to_ne_bytes()).collect();
    let (row, reads, role) = (4 * 7, AtomicUsize::new(0), role.to_string());
    let read = move |rows: Range<u64>, into: &mut [u8]| {
        // A read by its block's size is of a pass; seeds are read otherwise.
        let is_block = rows.end - rows.start >= 100;
        if is_block && rank == 1 && reads.fetch_add(1, Ordering::SeqCst) == 15 {
            match role.as_str() {
                "die" => process::abort(),
                "fail" => return Err(io::Error::other("no more rows")),
                "dawdle" => thread::sleep(Duration::from_secs(20)),
                _ => {}
            }
        }
        into.copy_from_slice(&bytes[rows.start as usize * row..rows.end as usize * row]);
        Ok(())
    };
    Source::from_fn(1003, 7, StoredType::F32, read).unwrap()
}

/// Bytes of two blocks of 120 rows, which come and go.
const ROOM: usize = 2 * 120 * 32;

/// The body of each process; nothing where it is none.
#[test]
fn worker() {
    let Ok(role) = env::var(ROLE) else { return };
    let rank: usize = env::var("RANK").unwrap().parse().unwrap();
    if role.starts_with("replica") {
        return be_replica(&role, rank);
    }
    let options = StreamOptions::on(Devices::Launched).block_rows(120).memory(ROOM);
    refuse_what_one_process_does(&source("", rank), &options);
    let mut settings = settings();
    if role == "differ" {
        settings = settings.seed(rank as u64);
    }
    let fit = settings.fit_stream(&source(&role, rank), &options);
    let path = PathBuf::from(env::var(OUT).unwrap()).join(rank.to_string());
    match fit {
        Ok(fit) => fit.save(path.with_extension("fit")).unwrap(),
        Err(e) => fs::write(path.with_extension("error"), e.to_string()).unwrap(),
    }
}

/// What the results of other processes would have to come to is refused, before any process is waited for.
fn refuse_what_one_process_does(source: &Source<'_>, options: &StreamOptions) {
    let path = env::temp_dir().join("none/labels.npy");
    let in_a_file = settings().fit_stream_to_npy(source, options, &path).map(drop);
    let of_fit = settings().fit(&rows()).unwrap().predict_to_npy(source, options, &path);
    let of_batch = settings().devices(Devices::Launched).fit(&rows().unsqueeze(0).unwrap()).map(drop);
    for refused in [in_a_file, of_fit, of_batch] {
        assert!(matches!(refused, Err(Error::Conflict { argument: "devices", .. })), "{refused:?}");
    }
}

/// Adds up with the other processes, and leaves what came of it. One of those that are to fail does so before the second sum.
fn be_replica(role: &str, rank: usize) {
    let (replica, device) = ReplicaRank::launched().unwrap();
    let mine = Tensor::new(&[rank as f64 + 0.1, 1.0], &device).unwrap();
    let sums = || -> candle_core::Result<Vec<f64>> {
        let first = replica.all_reduce(&mine)?;
        if role == "replica-lost" && rank == 1 {
            candle_core::bail!("on purpose");
        }
        (replica.all_reduce(&(&first * 0.1)?)? + first)?.to_vec1()
    };
    let path = PathBuf::from(env::var(OUT).unwrap()).join(rank.to_string());
    match sums() {
        Ok(sums) => {
            replica.finish();
            fs::write(path.with_extension("error"), format!("{sums:?}")).unwrap()
        }
        Err(e) => fs::write(path.with_extension("error"), e.to_string()).unwrap(),
    }
}

/// Starts the processes of a role as torchrun does, lets them end, and returns what each has left and how long all took.
fn launch(role: &str, ranks: usize, out: &Path) -> (Vec<Result<Fit, String>>, Duration) {
    fs::create_dir_all(out).unwrap();
    // Not the port of another test that runs now.
    let port = 21_000 + process::id() % 500 * 16 + role.bytes().map(u32::from).sum::<u32>() % 8 * 2;
    let start = |rank: usize| {
        let mut command = Command::new(env::current_exe().unwrap());
        command.args(["--exact", "launched::worker", "--nocapture"]).stdout(Stdio::null());
        command.env(ROLE, role).env(OUT, out).env("RANK", rank.to_string()).env("LOCAL_RANK", rank.to_string());
        command.env("WORLD_SIZE", ranks.to_string()).env("MASTER_ADDR", "127.0.0.1");
        command.env("MASTER_PORT", port.to_string()).env_remove("NCCL_COMM_ID").spawn().unwrap()
    };
    let begun = Instant::now();
    let mut processes: Vec<Child> = (0..ranks).map(start).collect();
    for process in &mut processes {
        process.wait().unwrap();
    }
    let ended = begun.elapsed();
    let left = |rank: usize| {
        let path = out.join(rank.to_string());
        match fs::read_to_string(path.with_extension("error")) {
            Ok(error) => Err(error),
            Err(_) => KMeans::load(path.with_extension("fit"), &Device::Cpu).map_err(|e| format!("nothing: {e}")),
        }
    };
    let all = (0..ranks).map(left).collect();
    fs::remove_dir_all(out).unwrap();
    (all, ended)
}

fn folder(role: &str) -> PathBuf {
    env::temp_dir().join(format!("launched-{role}-{}", process::id()))
}

/// The GPUs that may be used, each for a process.
fn gpus() -> usize {
    if !devices().iter().any(Device::is_cuda) {
        return 0;
    }
    CudaContext::device_count().unwrap() as usize
}

#[test]
fn processes_have_the_bits_of_one() {
    let (whole, gpus) = (settings().fit(&rows()).unwrap(), gpus());
    for ranks in (1..=gpus).filter(|ranks| ranks.is_power_of_two()) {
        for role in ["fit", "dawdle"] {
            let (all, _) = launch(role, ranks, &folder(&format!("{role}-{ranks}")));
            for (rank, fit) in all.into_iter().enumerate() {
                assert_same_fit(&fit.unwrap(), &whole, &format!("{role}, rank {rank} of {ranks}"));
            }
        }
    }
}

#[test]
fn a_process_that_fails_or_dies_ends_the_others() {
    let ranks = gpus();
    if ranks < 2 {
        eprintln!("a_process_that_fails_or_dies_ends_the_others: skipped without two GPUs");
        return;
    }
    for role in ["fail", "die", "differ"] {
        let (all, took) = launch(role, ranks, &folder(role));
        assert!(took < Duration::from_secs(60), "{role}: {took:?}");
        for (rank, fit) in all.into_iter().enumerate() {
            let error = fit.expect_err(role);
            eprintln!("{role}, rank {rank}, {took:.1?}: {error}");
            match (role, rank) {
                ("fail", 1) => assert!(error.contains("no more rows"), "{error}"),
                ("fail", _) => assert!(error.starts_with(&format!("rank 1 of {ranks}: ")), "{error}"),
                ("die", 1) => assert!(error.starts_with("nothing"), "{error}"),
                ("die", _) => assert!(error.contains("in vain"), "{error}"),
                _ => assert!(error.contains("seed"), "{error}"),
            }
        }
    }
}

/// NCCL wants a GPU for each, and says so.
#[test]
fn threads_with_a_gpu_each_have_the_bits_of_one() {
    let (whole, gpus) = (settings().fit(&rows()).unwrap(), gpus());
    for count in 1..=gpus {
        let options = StreamOptions::on(Devices::These((0..count).collect())).block_rows(120);
        for memory in [ROOM, 1 << 20] {
            let fit = settings().fit_stream(&source("fit", 0), &options.clone().memory(memory)).unwrap();
            assert_same_fit(&fit, &whole, &format!("{count} GPUs"));
        }
    }
    if gpus > 0 {
        let beyond = StreamOptions::on(Devices::These(vec![gpus]));
        let refused = settings().fit_stream(&source("fit", 0), &beyond);
        assert!(matches!(refused, Err(Error::Range { argument: "devices", .. })), "{refused:?}");
    }
}

/// Threads with a GPU each add up what threads that share a CPU do, to the bit, and learn alike.
#[test]
fn replicas_with_a_gpu_each_add_up_in_their_order() {
    let gpus: Vec<_> = (0..gpus()).map(|ordinal| Device::new_cuda(ordinal).unwrap()).collect();
    for count in 1..=gpus.len() {
        check_sums(&gpus[..count]);
        let of_threads = codebook_of_ranks(&vec![Device::Cpu; count]);
        for (a, b) in codebook_of_ranks(&gpus[..count]).into_iter().zip(of_threads) {
            assert!((a - b).abs() < 1e-12, "{count} GPUs: {a}, threads: {b}");
        }
    }
    if gpus.len() > 1 {
        let left = on_ranks(&gpus[..2], |device, replica| {
            let mine = Tensor::ones(3, DType::F64, device).unwrap();
            replica.all_reduce(&mine).unwrap();
            match replica.rank() {
                0 => None,
                _ => Some(replica.all_reduce(&mine).unwrap_err().to_string()),
            }
        });
        assert!(left[1].as_ref().is_some_and(|error| error.contains("rank 0 of 2")), "{left:?}");
    }
}

/// Processes add up in their order, and one that fails ends the others.
#[test]
fn processes_are_replicas() {
    let gpus = gpus();
    for ranks in (1..=gpus).filter(|ranks| ranks.is_power_of_two()) {
        let first = (0..ranks).map(|rank| rank as f64 + 0.1).reduce(|a, b| a + b).unwrap();
        let add = |v: f64| (1..ranks).fold(v, |sum, _| sum + v);
        let sums = [add(first * 0.1) + first, add(ranks as f64 * 0.1) + ranks as f64];
        let (all, _) = launch("replica-add", ranks, &folder(&format!("replica-{ranks}")));
        for (rank, left) in all.into_iter().enumerate() {
            assert_eq!(left.unwrap_err(), format!("{sums:?}"), "rank {rank} of {ranks}");
        }
    }
    if gpus > 1 {
        let (all, took) = launch("replica-lost", gpus, &folder("replica-lost"));
        assert!(took < Duration::from_secs(60), "{took:?}");
        for (rank, left) in all.into_iter().enumerate() {
            let error = left.unwrap_err();
            assert!(error.contains(if rank == 1 { "on purpose" } else { "rank 1 of" }), "rank {rank}: {error}");
        }
    }
}
