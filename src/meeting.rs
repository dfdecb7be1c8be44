//! Ranks that are threads of one process.

use crate::{
    error::{Error, Result},
    host, primitives,
    ranks::Ranks,
};
use candle_core::Tensor;
use std::{
    panic::resume_unwind,
    sync::{
        atomic::{AtomicBool, Ordering},
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
    },
    thread,
};

/// The place where the ranks of a process meet: each leaves a message and takes those of all.
struct Meeting {
    ranks: usize,
    round: Mutex<Round>,
    changed: Condvar,
}

#[derive(Default)]
struct Round {
    number: u64,
    /// The messages of this round so far.
    arrived: Vec<Option<Message>>,
    /// The messages of the last round.
    complete: Arc<Vec<Message>>,
    /// The rank that has failed, and why.
    failed: Option<(usize, String)>,
}

/// A message of a rank to the others.
#[derive(Clone)]
enum Message {
    Numbers(Vec<f64>),
    Sums(Tensor),
}

impl Meeting {
    fn new(ranks: usize) -> Self {
        let round = Round { arrived: vec![None; ranks], ..Round::default() };
        Self { ranks, round: Mutex::new(round), changed: Condvar::new() }
    }

    fn round(&self) -> MutexGuard<'_, Round> {
        self.round.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The messages of all ranks, once each has left its own.
    fn exchange(&self, rank: usize, mine: Message) -> Result<Arc<Vec<Message>>> {
        let mut round = self.round();
        let number = round.number;
        round.arrived[rank] = Some(mine);
        if round.arrived.iter().all(Option::is_some) {
            round.complete = Arc::new(round.arrived.iter_mut().filter_map(Option::take).collect());
            round.number += 1;
            self.changed.notify_all();
        }
        while round.number == number {
            self.check(&round)?;
            round = self.changed.wait(round).unwrap_or_else(PoisonError::into_inner);
        }
        Ok(round.complete.clone())
    }

    fn check(&self, round: &Round) -> Result<()> {
        round.failed.as_ref().map_or(Ok(()), |(rank, reason)| {
            let source = Box::new(Error::Candle(candle_core::Error::msg(reason)));
            Err(Error::InRank { rank: *rank, ranks: self.ranks, source })
        })
    }

    fn fail(&self, rank: usize, reason: String) {
        self.round().failed.get_or_insert((rank, reason));
        self.changed.notify_all();
    }
}

/// A rank of a meeting. If it is dropped before it is `done`, the others go home.
pub(crate) struct Attendee {
    meeting: Arc<Meeting>,
    rank: usize,
    done: AtomicBool,
}

impl Attendee {
    /// All of a meeting of so many ranks.
    pub(crate) fn all(ranks: usize) -> Vec<Self> {
        let meeting = Arc::new(Meeting::new(ranks));
        let attendee = |rank| Self { meeting: meeting.clone(), rank, done: AtomicBool::new(false) };
        (0..ranks).map(attendee).collect()
    }
}

impl Drop for Attendee {
    fn drop(&mut self) {
        if !self.done.load(Ordering::Relaxed) {
            self.meeting.fail(self.rank, "it has left, or panicked".into());
        }
    }
}

impl Ranks for Attendee {
    fn rank(&self) -> usize {
        self.rank
    }

    fn count(&self) -> usize {
        self.meeting.ranks
    }

    /// Each rank adds up what all have, which takes no more than the sums' memory times the ranks.
    fn reduce(&self, sums: &Tensor) -> Result<()> {
        let (own_sums, device) = (sums.copy()?, sums.device());
        // Ranks have streams of their own.
        device.synchronize()?;
        let messages = self.meeting.exchange(self.rank, Message::Sums(own_sums))?;
        for (rank, message) in messages.iter().enumerate() {
            if let (true, Message::Sums(others)) = (rank != self.rank, message) {
                primitives::merge(sums, &host::to_device(others, device)?)?;
            }
        }
        Ok(device.synchronize()?)
    }

    /// Each rank adds up what all have.
    fn sum(&self, mine: &Tensor) -> Result<Tensor> {
        let device = mine.device();
        device.synchronize()?;
        let messages = self.meeting.exchange(self.rank, Message::Sums(mine.clone()))?;
        let mut sum: Option<Tensor> = None;
        for message in messages.iter() {
            let Message::Sums(t) = message else { unreachable!("ranks say the same in the same order") };
            if t.dims() != mine.dims() {
                return Err(Error::Shape {
                    argument: "all_reduce",
                    got: mine.dims().to_vec(),
                    expected: t.dims().to_vec(),
                });
            }
            let t = host::to_device(t, device)?;
            sum = Some(sum.map_or(Ok(t.clone()), |sum| sum + &t)?);
        }
        device.synchronize()?;
        Ok(sum.unwrap_or_else(|| mine.clone()))
    }

    fn gather(&self, mine: Vec<f64>) -> Result<Vec<Vec<f64>>> {
        let numbers = |message: &Message| match message {
            Message::Numbers(numbers) => numbers.clone(),
            Message::Sums(_) => unreachable!("ranks say the same in the same order"),
        };
        Ok(self.meeting.exchange(self.rank, Message::Numbers(mine))?.iter().map(numbers).collect())
    }

    fn check(&self) -> Result<()> {
        self.meeting.check(&self.meeting.round())
    }

    fn done(&self) {
        self.done.store(true, Ordering::Relaxed);
    }
}

/// Lets so many ranks work, each on a thread of its own, and returns what they return, in their order. If some fail, it is the first
/// one's error, which names the rank unless all have failed alike, of their own accord.
pub(crate) fn run_ranks<T: Send>(ranks: usize, work: impl Fn(&dyn Ranks) -> Result<T> + Sync) -> Result<Vec<T>> {
    let work = &work;
    let done: Vec<Result<T>> = thread::scope(|scope| {
        let attend = |attendee: Attendee| {
            scope.spawn(move || {
                let done = work(&attendee);
                if let Err(error) = &done {
                    attendee.meeting.fail(attendee.rank, error.to_string());
                }
                attendee.done();
                done
            })
        };
        let threads: Vec<_> = Attendee::all(ranks).into_iter().map(attend).collect();
        // All have ended before any panic goes on.
        let ended: Vec<_> = threads.into_iter().map(|thread| thread.join()).collect();
        ended.into_iter().map(|done| done.unwrap_or_else(|panic| resume_unwind(panic))).collect()
    });
    let own = |done: &Result<T>| done.as_ref().err().is_some_and(|e| !matches!(e, Error::InRank { .. }));
    let (alike, first) = (done.iter().all(own), done.iter().position(own));
    let name = |(rank, done): (usize, Result<T>)| {
        done.map_err(|source| match source {
            source if alike => source,
            source => Error::InRank { rank, ranks, source: Box::new(source) },
        })
    };
    match first {
        Some(first) => done.into_iter().enumerate().skip(first).take(1).map(name).collect(),
        None => done.into_iter().collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{panic::catch_unwind, time::Duration};

    #[test]
    fn messages_arrive_in_the_order_of_ranks() {
        for ranks in 1..6 {
            let rounds = run_ranks(ranks, |r| {
                (0..50)
                    .map(|i| {
                        if (i + r.rank()) % 7 == 0 {
                            thread::sleep(Duration::from_millis(1));
                        }
                        r.gather(vec![(i * 10 + r.rank()) as f64])
                    })
                    .collect::<Result<Vec<_>>>()
            });
            for round in rounds.unwrap() {
                for (i, all) in round.iter().enumerate() {
                    let expected: Vec<_> = (0..ranks).map(|rank| vec![(i * 10 + rank) as f64]).collect();
                    assert_eq!(*all, expected);
                }
            }
        }
    }

    fn refusal(row: usize) -> Error {
        Error::NonFinite { argument: "x", batch: 0, row }
    }

    /// Whoever fails, wherever the others are, none waits for it.
    #[test]
    fn a_rank_that_fails_ends_the_others_and_is_named() {
        for (failing, rounds) in (0..4).flat_map(|rank| [0, 1, 5].map(|rounds| (rank, rounds))) {
            let failed = run_ranks(4, |r| {
                for round in 0..10 {
                    if r.rank() == failing && round == rounds {
                        return Err(refusal(17));
                    }
                    r.gather(vec![])?;
                }
                Ok(())
            });
            match failed {
                Err(Error::InRank { rank, ranks: 4, source }) => {
                    assert_eq!(rank, failing);
                    assert!(matches!(*source, Error::NonFinite { row: 17, .. }), "{source}");
                }
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn what_all_refuse_is_refused_as_by_one() {
        let refused = run_ranks::<()>(3, |_| Err(refusal(4)));
        assert!(matches!(refused, Err(Error::NonFinite { row: 4, .. })), "{refused:?}");
    }

    #[test]
    fn a_rank_that_panics_ends_the_others() {
        let panicked = catch_unwind(|| {
            run_ranks(3, |r| match r.rank() {
                1 => panic!("on purpose"),
                _ => r.gather(vec![]),
            })
        });
        let panic = panicked.unwrap_err();
        assert_eq!(panic.downcast_ref(), Some(&"on purpose"));
    }
}
