//! The host's threads and memory: every loop over rows, centroids or problems runs here, on threads that wait for nothing.
//!
//! A caller may hold read locks on tensors, and Candle holds some around custom ops. A rayon worker that waits for its own
//! tasks runs other people's meanwhile, and one of those may ask for the same lock behind a writer that waits for the first
//! (rayon#592: a deadlock). So the caller does its own work and nothing else, while threads of a pool of this crate's own, as large as the
//! caller's, help it. What runs there takes no lock of a tensor and calls neither Candle's ops nor a user's functions.

use crate::error::{Error, Result};
use candle_core::{DType, Device, Shape, Tensor};
use rayon::{prelude::*, ThreadPool, ThreadPoolBuilder};
use std::{
    any::Any,
    cell::Cell,
    cmp::Ordering,
    hint::spin_loop,
    mem::{transmute, MaybeUninit},
    panic::{catch_unwind, resume_unwind, AssertUnwindSafe},
    sync::{
        atomic::{
            AtomicUsize,
            Ordering::{AcqRel, Acquire, Relaxed},
        },
        mpsc, Arc, Mutex, PoisonError,
    },
    thread::{self, Thread},
};

/// Work that is worth waking another thread for, in steps of about a nanosecond. Less runs on the caller's thread.
const GRAIN: usize = 1 << 14;
/// Work that is worth taking from the others, once there are others.
const PIECE: usize = 1 << 12;

/// Room for `len` elements, or a typed refusal.
pub(crate) fn buffer<T>(op: &'static str, len: usize) -> Result<Vec<T>> {
    let mut buffer = Vec::new();
    buffer.try_reserve_exact(len).map_err(|e| {
        let bytes = len.saturating_mul(size_of::<T>());
        Error::OutOfMemory { op, bytes, source: candle_core::Error::wrap(e) }
    })?;
    Ok(buffer)
}

/// Makes room for so many more, or refuses with a type.
pub(crate) fn reserve<T>(op: &'static str, buffer: &mut Vec<T>, more: usize) -> Result<()> {
    buffer.try_reserve(more).map_err(|e| {
        let bytes = (buffer.len().saturating_add(more)).saturating_mul(size_of::<T>());
        Error::OutOfMemory { op, bytes, source: candle_core::Error::wrap(e) }
    })
}

/// `len` times `value`, or a typed refusal.
pub(crate) fn filled<T: Clone>(op: &'static str, len: usize, value: T) -> Result<Vec<T>> {
    let mut buffer = buffer(op, len)?;
    buffer.resize(len, value);
    Ok(buffer)
}

/// `len` zeros, or a typed refusal. Nobody has written them, so that their pages come to be where and when someone does.
pub(crate) fn zeros_unwritten<T: Clone>(op: &'static str, len: usize, zero: T) -> Result<Vec<T>> {
    // What is allocated as zeros is there, or the process ends: so it is asked for here first.
    buffer::<T>(op, len)?;
    let mut zeros = vec![zero; len];
    ask_for_huge_pages(&mut zeros);
    Ok(zeros)
}

/// Asks the system for the largest pages that it has, of which 25,000 fewer come to be for a hundred megabytes. It need not heed that.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
fn ask_for_huge_pages<T>(zeros: &mut [T]) {
    const PAGE: usize = 2 << 20;
    let bytes = zeros.as_mut_ptr_range();
    let (start, end) = (bytes.start.addr().next_multiple_of(PAGE), bytes.end.addr() / PAGE * PAGE);
    if start < end {
        let from = bytes.start.cast::<u8>().wrapping_add(start - bytes.start.addr());
        // SAFETY: these pages lie inside of `zeros`, and the call changes nothing of what they hold. Whether it fails makes no difference.
        unsafe { libc::madvise(from.cast(), end - start, libc::MADV_HUGEPAGE) };
    }
}

#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
fn ask_for_huge_pages<T>(_: &mut [T]) {}

/// A tensor of zeros. What Candle allocates on the CPU is there, or the process ends: so it is asked for here first.
pub(crate) fn zeros(op: &'static str, shape: impl Into<Shape>, dtype: DType, device: &Device) -> Result<Tensor> {
    let shape = shape.into();
    room(op, shape.elem_count(), dtype, device)?;
    Ok(Tensor::zeros(shape, dtype, device)?)
}

/// The tensor on a device. What goes from one GPU to another goes through the host: by cudarc 0.19 such a copy is queued in the context of
/// the GPU that it comes from, so that where threads have streams of their own, nothing on the other GPU waits for it.
pub(crate) fn to_device(t: &Tensor, device: &Device) -> candle_core::Result<Tensor> {
    if t.device().is_cuda() && device.is_cuda() && !t.device().same_device(device) {
        return t.to_device(&Device::Cpu)?.to_device(device);
    }
    t.to_device(device)
}

/// Refuses, with a type, what Candle would have no room for on the CPU.
pub(crate) fn room(op: &'static str, len: usize, dtype: DType, device: &Device) -> Result<()> {
    if device.is_cpu() {
        buffer::<u8>(op, len.saturating_mul(dtype.size_in_bytes()))?;
    }
    Ok(())
}

/// The items of one task, for items that take so many steps each.
pub(crate) fn items_per_task(steps: usize) -> usize {
    (GRAIN / steps.max(1)).max(1)
}

/// `f(i)` for each `i` below `count`, each about so many steps.
pub(crate) fn map<R: Send>(
    op: &'static str,
    count: usize,
    steps: usize,
    f: impl Fn(usize) -> R + Send + Sync,
) -> Result<Vec<R>> {
    let (least, mut out) = (items_per_task(steps), buffer(op, count)?);
    if count <= least {
        out.extend((0..count).map(f));
        return Ok(out);
    }
    let len = piece_len(count, steps);
    let pieces = out.spare_capacity_mut()[..count].chunks_mut(len).enumerate().collect();
    each_piece(pieces, |(piece, out): (usize, &mut [MaybeUninit<R>])| {
        out.iter_mut().zip(piece * len..).for_each(|(out, i)| _ = out.write(f(i)));
    })?;
    // SAFETY: the pieces were these elements of the buffer's room, and all of each has been written, or there would have been a panic.
    unsafe { out.set_len(count) };
    Ok(out)
}

/// All `f(i)` for `i` below `count`, each about so many steps, in one by an `add` that is associative; none of nothing.
pub(crate) fn reduce<R: Send>(
    count: usize,
    steps: usize,
    f: impl Fn(usize) -> R + Send + Sync,
    add: impl Fn(R, R) -> R + Send + Sync,
) -> Result<Option<R>> {
    let least = items_per_task(steps);
    if count <= least {
        return Ok((0..count).map(f).reduce(add));
    }
    let len = piece_len(count, steps);
    let mut sums: Vec<Option<R>> = (0..count.div_ceil(len)).map(|_| None).collect();
    each_piece(sums.iter_mut().enumerate().collect(), |(piece, sum): (usize, &mut Option<R>)| {
        *sum = (piece * len..count.min((piece + 1) * len)).map(&f).reduce(&add);
    })?;
    Ok(sums.into_iter().flatten().reduce(add))
}

/// Calls `f` with each of the `items`, each about so many steps. Who is the first to work makes a `scratch`, and others use it again.
pub(crate) fn for_each<T: Send, S: Send>(
    items: Vec<T>,
    steps: usize,
    scratch: impl Fn() -> S + Send + Sync,
    f: impl Fn(&mut S, T) -> Result<()> + Send + Sync,
) -> Result<()> {
    let least = items_per_task(steps);
    if items.len() <= least {
        let mut scratch = scratch();
        return items.into_iter().try_for_each(|item| f(&mut scratch, item));
    }
    let len = piece_len(items.len(), steps);
    let mut items = items.into_iter();
    let pieces = (0..items.len().div_ceil(len)).map(|_| items.by_ref().take(len).collect()).collect();
    let (failed, scratches) = (Mutex::new(None), Mutex::new(vec![]));
    let scratches = || scratches.lock().unwrap_or_else(PoisonError::into_inner);
    each_piece(pieces, |items: Vec<T>| {
        let failed = || failed.lock().unwrap_or_else(PoisonError::into_inner);
        if failed().is_none() {
            let left = scratches().pop();
            let mut scratch = left.unwrap_or_else(&scratch);
            if let Err(error) = items.into_iter().try_for_each(|item| f(&mut scratch, item)) {
                *failed() = Some(error);
            }
            scratches().push(scratch);
        }
    })?;
    failed.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
}

/// Sorts `items`, equal ones in any order.
pub(crate) fn sort<T: Send>(items: &mut [T], by: impl Fn(&T, &T) -> Ordering + Send + Sync) -> Result<()> {
    // A sort of this many takes some ten steps an item.
    if items.len() <= items_per_task(10) {
        items.sort_unstable_by(by);
        return Ok(());
    }
    run(&mut || items.par_sort_unstable_by(&by))
}

/// Pieces of `count` items for each thread, of which some may take longer than others.
const PIECES_PER_THREAD: usize = 8;

/// The items of a piece, for items that take so many steps each. Nobody sees how many pieces there are.
fn piece_len(count: usize, steps: usize) -> usize {
    count.div_ceil(PIECES_PER_THREAD * rayon::current_num_threads()).max(PIECE / steps.max(1))
}

/// Calls `f` with each of the `pieces`. It and what calls it are thin: the crew's machinery is compiled once, for [`each_index`].
fn each_piece<P: Send>(pieces: Vec<P>, f: impl Fn(P) + Sync) -> Result<()> {
    let pieces: Vec<_> = pieces.into_iter().map(|piece| Mutex::new(Some(piece))).collect();
    each_index(pieces.len(), &|i| {
        let piece = pieces[i].lock().unwrap_or_else(PoisonError::into_inner).take();
        piece.into_iter().for_each(&f);
    })
}

fn each_index(count: usize, f: &(dyn Fn(usize) + Sync)) -> Result<()> {
    let threads = rayon::current_num_threads();
    // SAFETY: only the lifetime of what `f` borrows is made longer. Nobody calls it but members of the crew, and `dismiss`, which every path from
    // here comes to, returns when there is none at work and none can come.
    let f: *const (dyn Fn(usize) + Sync + 'static) = unsafe { transmute(f) };
    let crew = Arc::new(Crew {
        f,
        count,
        most: threads.min(count),
        next: AtomicUsize::new(0),
        at_work: AtomicUsize::new(0),
        caller: thread::current(),
        panic: Mutex::new(None),
    });
    // Without threads there is nobody to help.
    if crew.most > 1 && !cfg!(target_family = "wasm") {
        let helped = crew.clone();
        pool(threads)?.spawn(move || helped.help(1));
    }
    crew.work();
    crew.dismiss();
    let panic = crew.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
    panic.map_or(Ok(()), |panic| resume_unwind(panic))
}

/// The threads that share a caller's work, each of which takes the next index that is left. Who comes when all are taken has nothing to do with it
/// any more: so the caller waits for nobody who is late.
struct Crew {
    f: *const (dyn Fn(usize) + Sync),
    count: usize,
    /// Members, the caller among them.
    most: usize,
    next: AtomicUsize,
    /// The helpers that are at work, and [`DISMISSED`] once no more may come.
    at_work: AtomicUsize,
    caller: Thread,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

// SAFETY: `f` is shared by threads, as it may be, and called while what it points to is there.
unsafe impl Send for Crew {}
// SAFETY: as above.
unsafe impl Sync for Crew {}

const DISMISSED: usize = 1 << (usize::BITS - 1);
/// Looks at the helpers before the caller sleeps: some microseconds.
const LOOKS: usize = 1 << 9;

impl Crew {
    fn work(&self) {
        let work = || {
            while let Some(i) = Some(self.next.fetch_add(1, Relaxed)).filter(|&i| i < self.count) {
                // SAFETY: whoever is at work has not been dismissed, and until then what is called is there.
                unsafe { (*self.f)(i) };
            }
        };
        if let Err(panic) = catch_unwind(AssertUnwindSafe(work)) {
            self.next.store(self.count, Relaxed);
            *self.panic.lock().unwrap_or_else(PoisonError::into_inner) = Some(panic);
        }
    }

    /// Works as member `i`, who calls the next two, so that nobody calls all.
    fn help(self: Arc<Self>, i: usize) {
        if self.at_work.fetch_add(1, AcqRel) & DISMISSED == 0 && self.next.load(Relaxed) < self.count {
            for i in [2 * i, 2 * i + 1].into_iter().filter(|&i| i < self.most) {
                let helped = self.clone();
                rayon::spawn(move || helped.help(i));
            }
            self.work();
        }
        if self.at_work.fetch_sub(1, AcqRel) == DISMISSED + 1 {
            self.caller.unpark();
        }
    }

    /// Returns when nobody is at work, and nobody will be.
    fn dismiss(&self) {
        self.at_work.fetch_or(DISMISSED, AcqRel);
        let mut looks = 0..LOOKS;
        while self.at_work.load(Acquire) != DISMISSED {
            match looks.next() {
                Some(_) => spin_loop(),
                None => thread::park(),
            }
        }
    }
}

thread_local!(static OURS: Cell<bool> = const { Cell::new(false) });

/// Runs `work` on the pool, while this thread sleeps. On a thread of the pool, at once.
fn run(work: &mut (dyn FnMut() + Send)) -> Result<()> {
    // Without threads there is nobody to wait for.
    if OURS.get() || cfg!(target_family = "wasm") {
        work();
        return Ok(());
    }
    let pool = pool(rayon::current_num_threads())?;
    let (done, wait) = mpsc::sync_channel(1);
    let task: Box<dyn FnOnce() + Send + '_> = Box::new(move || {
        let result = catch_unwind(AssertUnwindSafe(work));
        // The receiver waits below.
        let _ = done.send(result);
    });
    // SAFETY: only the lifetime of what the task borrows is made longer. This function does not return or unwind before
    // `recv` does, which is when the task has sent its result, `work` being used up, or has been dropped.
    let task: Box<dyn FnOnce() + Send + 'static> = unsafe { transmute(task) };
    pool.spawn(task);
    match wait.recv() {
        Ok(result) => {
            result.unwrap_or_else(|panic| resume_unwind(panic));
            Ok(())
        }
        Err(_) => unreachable!("the pool is never dropped, and a task always sends"),
    }
}

/// The pool of so many threads, which is kept.
fn pool(threads: usize) -> Result<Arc<ThreadPool>> {
    static POOLS: Mutex<Vec<Arc<ThreadPool>>> = Mutex::new(vec![]);
    let mut pools = POOLS.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(pool) = pools.iter().find(|pool| pool.current_num_threads() == threads) {
        return Ok(pool.clone());
    }
    let builder = ThreadPoolBuilder::new().num_threads(threads).thread_name(|i| format!("flash-kmeans-{i}"));
    let pool = builder.start_handler(|_| OURS.set(true)).build().map_err(candle_core::Error::wrap)?;
    pools.push(Arc::new(pool));
    Ok(pools[pools.len() - 1].clone())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    /// Enough for a task each.
    const LONG: usize = GRAIN;

    #[test]
    fn work_runs_on_as_many_threads_as_the_caller_has_and_nested_work_too() {
        for threads in [1, 2, 5] {
            let caller = ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let seen = caller.install(|| map("test", 100, LONG, |_| rayon::current_num_threads()).unwrap());
            assert_eq!(seen, vec![threads; 100]);
            let nested = |i| map("test", 10, LONG, |j| i * j).unwrap().into_iter().sum::<usize>();
            let all = caller.install(|| reduce(100, LONG, nested, |a, b| a + b).unwrap());
            assert_eq!(all, Some(45 * 4950));
        }
        // Small work stays where it is.
        let here = thread::current().id();
        assert_eq!(map("test", 10, 1, |_| thread::current().id()).unwrap(), [here; 10]);
    }

    #[test]
    fn a_worker_that_waits_runs_nothing_else() {
        // With one worker, anything it runs meanwhile is on its own stack.
        let caller = ThreadPoolBuilder::new().num_threads(1).build().unwrap();
        let waiting = std::sync::atomic::AtomicBool::new(false);
        caller.scope(|s| {
            for _ in 0..50 {
                s.spawn(|_| {
                    assert!(!waiting.swap(true, std::sync::atomic::Ordering::SeqCst));
                    map("test", 10, LONG, |_| thread::yield_now()).unwrap();
                    waiting.store(false, std::sync::atomic::Ordering::SeqCst);
                });
            }
        });
    }

    #[test]
    fn panics_reach_the_caller() {
        let work = |i| assert!(i != 7, "seven");
        let panic = catch_unwind(|| map("test", 10, LONG, work)).unwrap_err();
        assert_eq!(panic.downcast_ref::<&str>(), Some(&"seven"));
        assert_eq!(map("test", 10, LONG, |i| i).unwrap().len(), 10);
    }

    #[test]
    fn memory_that_is_not_there_is_refused() {
        let refused = map("test", usize::MAX / 16, 1, |i| i);
        assert!(matches!(refused, Err(Error::OutOfMemory { op: "test", bytes, .. }) if bytes > usize::MAX / 4));
    }
}
