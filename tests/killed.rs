//! Checkpoints under faults: processes that are killed at any instant, files that are damaged, and file systems that refuse. Fits run in
//! processes of their own, which are this binary once more. How many faults that are, and of which kind, is in `tests/record/faults.md`.
#![cfg(unix)]

mod common;

use candle_core::{DType, Device, Tensor};
use candle_flash_kmeans::{testing::on_stage, Checkpoint, Error, Fit, KMeans, Source, StreamOptions};
use common::*;
use rand::Rng;
use std::{
    cell::RefCell,
    collections::BTreeMap,
    env, fs, io,
    os::unix::{fs::PermissionsExt, process::ExitStatusExt},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus},
    rc::Rc,
    thread,
    time::{Duration, Instant},
};
use twox_hash::XxHash3_64;

const FILES: [&str; 2] = ["checkpoint-0.safetensors", "checkpoint-1.safetensors"];

/// The stages of `src/stages.rs` that a fit reaches.
const WORK: [&str; 6] =
    ["block arrived", "block assigned", "block added", "sums reduced", "centroids finished", "iteration over"];
const FILE: [&str; 8] = [
    "checkpoint due",
    "create temporary",
    "write header",
    "write tensors",
    "sync temporary",
    "rename",
    "sync folder",
    "written",
];

/// Two runs of six iterations, and the rows.
fn problem() -> (KMeans, Tensor) {
    (KMeans::new(12).tol(0.0).n_init(2).max_iters(6).seed(5), blobs(&[600, 6], 30, DType::F32, &mut rng(9)))
}

/// A fit in blocks of so many rows, none of which stay, that writes a checkpoint after each.
fn fit(dir: &Path, rows: usize) -> Result<Fit, Error> {
    let (settings, x) = problem();
    let options = StreamOptions::new(&Device::Cpu).block_rows(rows).memory(8 * rows * 24);
    settings.fit_stream(&Source::from_tensor(&x)?, &options.checkpoint(Checkpoint::in_dir(dir).every(Duration::ZERO)))
}

/// The fit that nothing ends.
fn whole() -> Fit {
    let (settings, x) = problem();
    settings.fit_stream(&Source::from_tensor(&x).unwrap(), &StreamOptions::new(&Device::Cpu)).unwrap()
}

/// Calls `reached` with each stage and how often it has been reached.
fn at_stages(mut reached: impl FnMut(&'static str, usize) -> io::Result<()> + 'static) {
    let mut counts = BTreeMap::<_, usize>::new();
    on_stage(Some(Box::new(move |stage| {
        let count = counts.entry(stage).or_default();
        *count += 1;
        reached(stage, *count)
    })));
}

/// Has a file operation or other work of this thread fail where it reaches a stage for the n-th time.
fn fail_at(stage: &'static str, n: usize, error: i32) {
    at_stages(move |reached, count| match (reached, count) == (stage, n) {
        true => Err(io::Error::from_raw_os_error(error)),
        false => Ok(()),
    });
}

/// Says what the fit of [`a_process_of_its_own`] does beside fitting.
const TASK: &str = "FLASH_KMEANS_KILLED";

/// A process that fits in blocks of so many rows, with a fault: none, `kill STAGE N`, `taken`, `limited BYTES` or `unprivileged`.
fn spawn(dir: &Path, rows: usize, fault: &str) -> Child {
    let task = format!("{}\n{rows}\n{fault}", dir.display());
    let mut command = Command::new(env::current_exe().unwrap());
    command.args(["--exact", "a_process_of_its_own", "--test-threads", "1", "--quiet"]).env(TASK, task);
    command.stdout(std::process::Stdio::null()).spawn().unwrap()
}

fn run(dir: &Path, rows: usize, fault: &str) -> ExitStatus {
    spawn(dir, rows, fault).wait().unwrap()
}

/// The result of a process that has come to its end.
fn result(dir: &Path) -> Fit {
    KMeans::load(dir.join("fit.safetensors"), &Device::Cpu).unwrap()
}

/// What the others start again and again. Without a task it is a fit, whose file is that of the fit without checkpoints.
#[test]
fn a_process_of_its_own() {
    let Ok(task) = env::var(TASK) else {
        let folder = Folder::new("alone");
        let dir = folder.emptied("fit");
        assert!(run(&dir, 100, "").success());
        return assert_same_fit(&result(&dir), &whole(), "in a process of its own");
    };
    let (dir, rest) = task.split_once('\n').unwrap();
    let ((rows, fault), dir) = (rest.split_once('\n').unwrap(), Path::new(dir));
    // SAFETY: these calls take and return plain integers, and end or restrict this process alone.
    let checked = |result: i32| assert_eq!(result, 0, "{}", io::Error::last_os_error());
    match fault.split_once(' ') {
        Some(("kill", at)) => {
            let (stage, n) = at.rsplit_once(' ').unwrap();
            let (stage, n) = (stage.to_string(), n.parse::<usize>().unwrap());
            at_stages(move |reached, count| {
                if (reached, count) == (&stage, n) {
                    // SAFETY: it takes and returns integers, and ends this process.
                    unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
                }
                Ok(())
            });
        }
        Some(("limited", bytes)) => {
            let bytes = bytes.parse().unwrap();
            let limit = libc::rlimit { rlim_cur: bytes, rlim_max: bytes };
            // SAFETY: the signal is ignored, so no handler runs, and the limit is read before the call returns.
            checked(unsafe {
                libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
                libc::setrlimit(libc::RLIMIT_FSIZE, &limit)
            });
        }
        _ if fault == "taken" => {
            (0..40).for_each(|call| fs::write(dir.join(temporary(std::process::id(), call)), "taken").unwrap());
        }
        // SAFETY: both take and return integers.
        _ if fault == "unprivileged" => unsafe {
            if libc::geteuid() == 0 {
                checked(libc::setuid(65534));
            }
        },
        _ => assert_eq!(fault, ""),
    }
    match fit(dir, rows.parse().unwrap()) {
        Ok(fit) => fit.save(dir.join("fit.safetensors")).unwrap(),
        Err(Error::Io { source, .. }) => std::process::exit(source.raw_os_error().unwrap()),
        Err(error) => panic!("{error}"),
    }
}

fn temporary(process: u32, call: usize) -> String {
    format!(".flash-kmeans-{process}-{call}.tmp")
}

/// Killed at each stage in five iterations or files, then once more at the same stage while it goes on, then left alone.
#[test]
fn a_process_that_is_killed_at_any_stage_loses_only_what_follows_the_last_checkpoint() {
    let (folder, whole, began) = (Folder::new("stages"), whole(), Instant::now());
    let counts = Rc::new(RefCell::new(BTreeMap::new()));
    let counting = counts.clone();
    at_stages(move |stage, n| {
        counting.borrow_mut().insert(stage, n);
        Ok(())
    });
    fit(&folder.emptied("fit"), 150).unwrap();
    on_stage(None);
    let mut stages: Vec<_> = counts.borrow().keys().copied().collect();
    stages.sort_by_key(|stage| WORK.iter().chain(&FILE).position(|known| known == stage));
    assert_eq!(stages, [&WORK[..], &FILE].concat());
    let mut kills = 0;
    for stage in stages {
        for i in 0..5 {
            let (dir, n) = (folder.emptied("fit"), 1 + (counts.borrow()[stage] - 1) * i / 4);
            let ended = run(&dir, 150, &format!("kill {stage} {n}"));
            assert_eq!(ended.signal(), Some(libc::SIGKILL), "{stage} {n}: {ended}");
            // What is left may not reach that stage.
            let ended = run(&dir, [100, 600, 37][i % 3], &format!("kill {stage} {}", 1 + i));
            assert!(ended.success() || ended.signal() == Some(libc::SIGKILL), "{stage} {n}: {ended}");
            kills += 1 + usize::from(!ended.success());
            assert_same_fit(&fit(&dir, 200).unwrap(), &whole, &format!("killed at {stage} {n}"));
        }
    }
    assert!(kills >= 14 * 5 + 50, "{kills}");
    println!("killed {kills} times at 14 stages in {:.1?}", began.elapsed());
}

/// Killed at random instants, again and again until a process comes to its end.
#[test]
fn a_process_that_is_killed_at_any_instant_goes_on() {
    let (folder, whole, began) = (Folder::new("instants"), whole(), Instant::now());
    let (mut rng, mut kills, mut within, mut ends) = (rng(77), 0, 0, 0);
    // As long as a process that is left alone takes, at most.
    let mut most = began.elapsed() + Duration::from_secs(1);
    while kills < 200 {
        let dir = folder.emptied("fit");
        for process in 0.. {
            let mut child = spawn(&dir, [150, 100, 600, 37][rng.random_range(0..4)], "");
            let life = most.mul_f64(rng.random_range(0.0..1.0));
            thread::sleep(life);
            child.kill().unwrap();
            let ended = child.wait().unwrap();
            if ended.success() {
                most = if process == 0 { most.min(life) } else { most };
                break;
            }
            assert_eq!(ended.signal(), Some(libc::SIGKILL), "{ended}");
            kills += 1;
            within += usize::from(FILES.iter().any(|name| dir.join(name).exists()));
        }
        assert_same_fit(&result(&dir), &whole, "killed at random instants");
        ends += 1;
    }
    assert!(within > 50, "{within} of {kills} processes had written a checkpoint");
    println!(
        "killed {kills} times at random instants, {within} with a checkpoint, in {ends} fits and {:.1?}",
        began.elapsed()
    );
}

/// A folder with both checkpoints of a fit that has ended, and the file that is the newer one.
fn ended(folder: &Folder) -> (PathBuf, PathBuf, PathBuf) {
    let dir = folder.emptied("fit");
    fail_at("checkpoint due", 21, libc::EIO);
    fit(&dir, 150).unwrap_err();
    on_stage(None);
    // Twenty have been written, in turns.
    let [older, newer] = FILES.map(|name| dir.join(name));
    (dir, newer, older)
}

/// A checkpoint with this checksum made right.
fn with_checksum(mut bytes: Vec<u8>) -> Vec<u8> {
    let key = b"\"checksum\":\"";
    let at = bytes.windows(key.len()).position(|text| text == key).unwrap() + key.len();
    bytes[at..at + 16].fill(b'0');
    let sum = format!("{:016x}", XxHash3_64::oneshot(&bytes));
    bytes[at..at + 16].copy_from_slice(sum.as_bytes());
    bytes
}

/// Bit flips, truncations and other versions of the newer file: it is refused, and the older one is taken.
#[test]
fn damaged_files_are_refused_and_the_one_before_is_taken() {
    let (folder, whole, began) = (Folder::new("damage"), whole(), Instant::now());
    let (dir, newer, older) = ended(&folder);
    let [newest, before] = [&newer, &older].map(|path| fs::read(path).unwrap());
    assert_eq!(with_checksum(newest.clone()), newest);
    let iteration = |bytes: &[u8]| {
        let key = b"\"added\":\"";
        bytes.windows(key.len()).position(|text| text == key).map(|at| bytes[at + key.len()..][..3].to_vec())
    };
    assert_ne!(iteration(&newest), iteration(&before));

    // Alone it is an error, before any row is read.
    let unread = Source::from_fn(600, 6, candle_flash_kmeans::StoredType::F32, |_, _| panic!("a row is read")).unwrap();
    let alone = folder.0.join("alone");
    fs::create_dir(&alone).unwrap();
    let options = StreamOptions::new(&Device::Cpu).checkpoint(Checkpoint::in_dir(&alone));
    let settings = problem().0;
    let refused = |bytes: &[u8], what: &str| {
        fs::write(alone.join(FILES[1]), bytes).unwrap();
        match settings.fit_stream(&unread, &options) {
            Err(Error::Format { .. }) => {}
            Err(Error::Mismatch { what, .. }) if what == "checksum" => {}
            other => panic!("{what}: {other:?}"),
        }
    };
    // With the one before it, that is what the fit goes on from: the next file has the same state as the damaged one had.
    let goes_on = |bytes: &[u8], what: &str| {
        fs::write(&newer, bytes).unwrap();
        fs::write(&older, &before).unwrap();
        fail_at("checkpoint due", 2, libc::EIO);
        fit(&dir, 150).unwrap_err();
        on_stage(None);
        assert!(fs::read(&newer).unwrap() == newest && fs::read(&older).unwrap() == before, "{what}");
    };
    let mut rng = rng(78);
    let mut damaged = newest.clone();
    for i in 0..10_000 {
        let bit = rng.random_range(0..8 * newest.len());
        damaged[bit / 8] ^= 1 << (bit % 8);
        refused(&damaged, &format!("bit {bit}"));
        if i % 50 == 0 {
            goes_on(&damaged, &format!("bit {bit}"));
        }
        damaged[bit / 8] ^= 1 << (bit % 8);
    }
    for i in 0..1_000 {
        let length = rng.random_range(0..newest.len());
        refused(&newest[..length], &format!("{length} bytes"));
        if i % 50 == 0 {
            goes_on(&newest[..length], &format!("{length} bytes"));
        }
    }
    // Other versions, with a checksum that is right: of the checkpoint, and of the file.
    for (text, other) in [("\"checkpoint\":\"1\"", "\"checkpoint\":\"0\""), ("kmeans\":\"1\"", "kmeans\":\"0\"")] {
        let at = newest.windows(text.len()).position(|bytes| bytes == text.as_bytes()).unwrap();
        let mut bytes = newest.clone();
        bytes[at..at + text.len()].copy_from_slice(other.as_bytes());
        let bytes = with_checksum(bytes);
        refused(&bytes, other);
        goes_on(&bytes, other);
    }
    assert_same_fit(&fit(&dir, 150).unwrap(), &whole, "after all");
    println!("10,000 bit flips, 1,000 truncations and 2 versions in {:.1?}", began.elapsed());
}

/// Every operation on a file refuses, for every reason: an error with that reason, and the files that were there are whole.
#[test]
fn a_file_system_that_refuses_leaves_the_last_checkpoint() {
    let (folder, whole) = (Folder::new("refuses"), whole());
    for stage in &FILE[1..7] {
        for error in [libc::ENOSPC, libc::EACCES, libc::EROFS, libc::EDQUOT, libc::EIO] {
            for n in [2, 3, 30] {
                let dir = folder.emptied("fit");
                fail_at(stage, n, error);
                let refused = fit(&dir, 150);
                on_stage(None);
                let Err(Error::Io { path, source }) = refused else { panic!("{stage} {n}: {refused:?}") };
                assert_eq!(source.raw_os_error(), Some(error), "{stage} {n}");
                assert!(FILES.iter().any(|name| path.ends_with(name)), "{path}");
                let mut names: Vec<_> = fs::read_dir(&dir).unwrap().map(|f| f.unwrap().file_name()).collect();
                names.sort();
                assert!(
                    !names.is_empty() && names.iter().zip(FILES).all(|(name, expected)| name == expected),
                    "{names:?}"
                );
                assert_same_fit(&fit(&dir, 90).unwrap(), &whole, &format!("{stage} {n} fails with {error}"));
            }
        }
    }
}

/// Refusals of the operating system itself, and names and folders that others use.
#[test]
fn limits_permissions_and_other_writers_leave_the_last_checkpoint() {
    let (folder, whole) = (Folder::new("limits"), whole());
    // Files end in the middle, of their header or their tensors.
    for bytes in [0, 1, 200, 500, 700] {
        let (dir, newer, older) = ended(&folder);
        let files = || [&newer, &older].map(|path| fs::read(path).unwrap());
        let before = files();
        assert!(before.iter().all(|bytes| bytes.len() > 700));
        assert_eq!(run(&dir, 150, &format!("limited {bytes}")).code(), Some(libc::EFBIG), "{bytes} bytes");
        assert!(files() == before && fs::read_dir(&dir).unwrap().count() == 2, "{bytes} bytes");
        assert_same_fit(&fit(&dir, 90).unwrap(), &whole, "after a full disk");
    }
    let (dir, ..) = ended(&folder);
    let permit = |mode| fs::set_permissions(&dir, fs::Permissions::from_mode(mode)).unwrap();
    permit(0o555);
    assert_eq!(run(&dir, 150, "unprivileged").code(), Some(libc::EACCES), "a folder that is only read");
    permit(0o755);
    assert_same_fit(&fit(&dir, 90).unwrap(), &whole, "after a folder that was only read");

    let (dir, newer, _) = ended(&folder);
    fs::remove_file(&newer).unwrap();
    fs::create_dir(&newer).unwrap();
    assert!(matches!(fit(&dir, 150), Err(Error::Io { .. })), "a folder in the place of a file");
    fs::remove_dir(&newer).unwrap();
    assert_same_fit(&fit(&dir, 90).unwrap(), &whole, "after a folder in the place of a file");

    let dir = folder.emptied("fit");
    assert!(run(&dir, 150, "taken").success());
    assert_same_fit(&result(&dir), &whole, "names that are taken");
    let taken =
        fs::read_dir(&dir).unwrap().map(|f| f.unwrap().path()).filter(|path| path.extension().unwrap() == "tmp");
    assert_eq!(taken.map(|path| fs::read(path).unwrap()).filter(|bytes| bytes == b"taken").count(), 40);

    // Two processes and two threads at a time.
    for rows in [150, 37] {
        let dir = folder.emptied("fit");
        let mut writers = [spawn(&dir, 150, ""), spawn(&dir, rows, "")];
        thread::scope(|scope| {
            let threads = [100, rows].map(|rows| {
                scope.spawn({
                    let dir = &dir;
                    move || fit(dir, rows).unwrap()
                })
            });
            for fit in threads.map(|thread| thread.join().unwrap()) {
                assert_same_fit(&fit, &whole, "one of four writers");
            }
        });
        assert!(writers.iter_mut().all(|writer| writer.wait().unwrap().success()));
        assert_same_fit(&result(&dir), &whole, "the last of two writers");
        assert_same_fit(&fit(&dir, 90).unwrap(), &whole, "after four writers");
    }
    let missing = folder.0.join("missing");
    let refused = fit(&missing, 150).unwrap_err();
    assert!(
        matches!(&refused, Error::Io { path, source } if Path::new(path) == missing && source.kind() == io::ErrorKind::NotFound)
    );
}
