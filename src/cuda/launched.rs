//! Ranks that are processes, one for each GPU, on one machine or many.

use super::nccl::{lost, Check, Comm};
use crate::{
    error::{Error, Result},
    ranks::{Ranks, Rendezvous},
};
use candle_core::{cuda_backend::CudaDevice, Tensor};
use std::{
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

/// The time between two signs of life.
const BEAT: Duration = Duration::from_secs(1);
/// For so long a rank waits for a sign of life of the others.
const PATIENCE: Duration = Duration::from_secs(15);
/// For so long it waits for them to start.
const START: Duration = Duration::from_secs(60);

/// A process among those that a launcher has started.
pub(super) struct Launched {
    comm: Comm,
    watch: Watch,
    rank: usize,
    ranks: usize,
}

impl Launched {
    pub fn new(dev: &CudaDevice, at: Rendezvous, rank: usize, ranks: usize) -> Result<Self> {
        let deadline = Deadline::of(rank, ranks, START, "to start");
        let comm = Comm::new(dev, at, rank, ranks, &|| deadline.check())?;
        let watch = Watch::new(comm.split(&|| deadline.check())?, rank, ranks);
        Ok(Self { comm, watch, rank, ranks })
    }

    fn check(&self) -> impl Fn() -> Result<()> + '_ {
        || self.watch.state.check(self.rank, self.ranks)
    }
}

impl Ranks for Launched {
    fn rank(&self) -> usize {
        self.rank
    }

    fn count(&self) -> usize {
        self.ranks
    }

    fn reduce(&self, sums: &Tensor) -> Result<()> {
        self.comm.reduce(sums, &self.check())
    }

    fn sum(&self, mine: &Tensor) -> Result<Tensor> {
        self.comm.sum(mine, &self.check())
    }

    fn gather(&self, mut mine: Vec<f64>) -> Result<Vec<Vec<f64>>> {
        let check = self.check();
        let lengths = self.comm.gather(&[mine.len() as f64], &check)?;
        let most = lengths.iter().fold(0.0, |most: f64, &len| most.max(len)) as usize;
        mine.resize(most, 0.0);
        let all = self.comm.gather(&mine, &check)?;
        Ok(lengths.iter().enumerate().map(|(rank, &len)| all[rank * most..][..len as usize].to_vec()).collect())
    }

    fn check(&self) -> Result<()> {
        self.watch.state.check(self.rank, self.ranks)
    }

    fn done(&self) {
        self.watch.state.say(Sign::Done);
    }
}

impl Drop for Launched {
    /// A rank that leaves before it is done has failed.
    fn drop(&mut self) {
        if self.watch.state.say(Sign::Failed) {
            self.comm.abort();
        }
    }
}

/// The end of waiting for other ranks.
struct Deadline {
    rank: usize,
    ranks: usize,
    start: Instant,
    patience: Duration,
    what: &'static str,
}

impl Deadline {
    fn of(rank: usize, ranks: usize, patience: Duration, what: &'static str) -> Self {
        Self { rank, ranks, start: Instant::now(), patience, what }
    }

    fn check(&self) -> Result<()> {
        if self.start.elapsed() < self.patience {
            return Ok(());
        }
        let reason = format!("waited {} s in vain for another rank {}", self.patience.as_secs(), self.what);
        Err(lost(self.rank, self.ranks, reason))
    }
}

/// The state that a rank reports with a sign of life.
#[derive(Clone, Copy, PartialEq)]
enum Sign {
    Working,
    Done,
    Failed,
}

/// A thread that exchanges signs of life with the other ranks, so that a rank that is slow can be told from one that is no more. A
/// collective alone does not tell them apart.
struct Watch {
    state: Arc<State>,
    thread: Option<JoinHandle<()>>,
}

struct State {
    now: Mutex<Now>,
    changed: Condvar,
}

struct Now {
    sign: Sign,
    loss: Option<Loss>,
}

/// Why the others are not waited for any more.
struct Loss {
    /// The rank that has failed, if somebody knows it.
    rank: Option<usize>,
    reason: String,
}

impl Loss {
    /// The loss of a rank that nobody can name.
    fn of(error: &Error) -> Self {
        let reason = match error {
            Error::InRank { source, .. } => source.to_string(),
            e => e.to_string(),
        };
        Self { rank: None, reason }
    }
}

impl Watch {
    fn new(mut comm: Comm, rank: usize, ranks: usize) -> Self {
        let now = Mutex::new(Now { sign: Sign::Working, loss: None });
        let state = Arc::new(State { now, changed: Condvar::new() });
        // The other communicator hangs as well, until whoever waits there hears of it.
        comm.tell_before_abort({
            let state = state.clone();
            move |e| state.lose(Loss::of(e))
        });
        let thread = thread::spawn({
            let state = state.clone();
            move || {
                if let Err(loss) = state.exchange_signs(&comm, rank, ranks) {
                    state.lose(loss);
                }
            }
        });
        Self { state, thread: Some(thread) }
    }
}

impl State {
    fn now(&self) -> MutexGuard<'_, Now> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lose(&self, loss: Loss) {
        self.now().loss.get_or_insert(loss);
    }

    /// Says how this rank has ended, and returns whether nothing had been said.
    fn say(&self, end: Sign) -> bool {
        let mut now = self.now();
        let first = now.sign == Sign::Working;
        if first {
            now.sign = end;
            self.changed.notify_all();
        }
        first
    }

    fn check(&self, rank: usize, ranks: usize) -> Result<()> {
        self.now().loss.as_ref().map_or(Ok(()), |loss| Err(lost(loss.rank.unwrap_or(rank), ranks, loss.reason.clone())))
    }

    /// Until all ranks are done, or one is lost.
    fn exchange_signs(&self, comm: &Comm, rank: usize, ranks: usize) -> std::result::Result<(), Loss> {
        loop {
            let sign = self.now().sign;
            let deadline = Deadline::of(rank, ranks, PATIENCE, "to give a sign of life");
            let check: Check<'_> = &|| deadline.check();
            let signs = comm.gather(&[f64::from(sign as u8)], check).map_err(|e| Loss::of(&e))?;
            if let Some(failed) = signs.iter().position(|&other| other == f64::from(Sign::Failed as u8)) {
                let reason = "it has failed, as its own error tells".into();
                return if failed == rank { Ok(()) } else { Err(Loss { rank: Some(failed), reason }) };
            }
            if signs.iter().all(|&other| other == f64::from(Sign::Done as u8)) {
                return Ok(());
            }
            let now = self.now();
            if now.sign == sign && sign == Sign::Working {
                let asleep = self.changed.wait_timeout_while(now, BEAT, |now| now.sign == sign);
                drop(asleep.unwrap_or_else(PoisonError::into_inner));
            }
        }
    }
}

impl Drop for Watch {
    /// Waits until the others know how this rank has ended.
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
