//! The devices that share a stream of rows.

use super::{fingerprint::Fingerprint, launch::Launch};
use crate::{
    error::{Error, Result},
    fit::Fit,
    host,
    kmeans::Devices,
    lloyd::state::State,
    meeting::{run_ranks, Attendee},
    primitives,
    ranks::{Alone, Ranks},
};
use candle_core::{DType, Device, Storage, Tensor};
use std::{env, ops::Range, panic::resume_unwind, thread};

/// The devices that the rows of a stream are worked on.
#[derive(Clone, Debug)]
pub(super) enum Place {
    /// One device, and the thread that asks for the work.
    One(Device),
    /// A rank for each of these, which is a thread. There may be several ranks to a device.
    Several(Vec<Device>),
    /// GPUs that are to be opened.
    Gpus(Devices),
    /// The GPU of this process, which is one of several.
    Launched(Device, LaunchedRank),
}

#[derive(Clone, Copy, Debug)]
pub(super) struct LaunchedRank {
    rank: usize,
    ranks: usize,
}

impl Place {
    /// The same with GPUs opened.
    pub fn open(&self) -> Result<Self> {
        let Self::Gpus(devices) = self else { return Ok(self.clone()) };
        let visible = primitives::gpus()?;
        if visible == 0 {
            let with = "a machine, or a build of this crate, without CUDA".into();
            return Err(Error::Conflict { argument: "devices", got: format!("{devices:?}"), with });
        }
        let open = |ordinal: usize| {
            if ordinal >= visible {
                return Err(Error::Range { argument: "devices", got: ordinal, min: 0, max: visible - 1 });
            }
            Ok(Device::new_cuda(ordinal)?)
        };
        Ok(match devices {
            Devices::All => Self::Several((0..visible).map(open).collect::<Result<_>>()?),
            Devices::These(ordinals) => {
                if ordinals.is_empty() {
                    return Err(Error::Range { argument: "devices", got: 0, min: 1, max: visible });
                }
                if let Some(twice) = (1..ordinals.len()).find(|&i| ordinals[..i].contains(&ordinals[i])) {
                    let (got, with) = (format!("GPU {}", ordinals[twice]), "itself: each GPU is one rank".into());
                    return Err(Error::Conflict { argument: "devices", got, with });
                }
                Self::Several(ordinals.iter().map(|&ordinal| open(ordinal)).collect::<Result<_>>()?)
            }
            Devices::Launched => {
                let Launch { rank, ranks, local_rank, address } = Launch::of_process()?;
                // A launcher may show each process its own GPU only.
                let device = open(if visible == 1 { 0 } else { local_rank })?;
                // Before NCCL starts its threads, which read the environment.
                env::set_var("NCCL_COMM_ID", address);
                Self::Launched(device, LaunchedRank { rank, ranks })
            }
        })
    }

    /// The device of the first rank of this process.
    pub fn first(&self) -> &Device {
        &self.devices()[0]
    }

    /// The devices of this process.
    pub fn devices(&self) -> &[Device] {
        match self {
            Self::One(device) | Self::Launched(device, _) => std::slice::from_ref(device),
            Self::Several(devices) => devices,
            Self::Gpus(_) => unreachable!("opened before it is used"),
        }
    }

    /// Whether this process is one of several.
    pub fn is_launched(&self) -> bool {
        matches!(self, Self::Launched(..))
    }

    /// The devices of this process, and the rows of each, of `n`.
    pub fn shares(&self, n: usize) -> impl Iterator<Item = (&Device, Range<usize>)> {
        let (first, ranks) = match self {
            Self::Launched(_, LaunchedRank { rank, ranks }) => (*rank, *ranks),
            _ => (0, self.devices().len()),
        };
        self.devices().iter().enumerate().map(move |(i, device)| (device, share(first + i, ranks, n)))
    }

    /// Gives `f` the rows of this process, of `n`.
    pub fn own_rows<T>(&self, n: usize, f: impl Fn(Range<usize>) -> T) -> T {
        match self {
            Self::Launched(_, LaunchedRank { rank, ranks }) => f(share(*rank, *ranks, n)),
            _ => f(0..n),
        }
    }

    /// Lets each rank of this process work on its device, and returns what they return, in their order.
    pub fn run<T: Send>(&self, work: impl Fn(&Device, &dyn Ranks) -> Result<T> + Sync) -> Result<Vec<T>> {
        match self {
            Self::One(device) => Ok(vec![work(device, &Alone)?]),
            Self::Several(devices) if devices.len() == 1 => Ok(vec![work(&devices[0], &Alone)?]),
            Self::Several(devices) => {
                let at = primitives::rendezvous(&devices[0])?.filter(|_| all_differ(devices));
                run_on(devices, |device, ranks| match at {
                    Some(at) => work_among(&*primitives::join(device, at, ranks)?, |ranks| work(device, ranks)),
                    None => work(device, ranks),
                })
            }
            Self::Launched(device, LaunchedRank { rank, ranks }) => {
                let ranks = primitives::join_launched(device, *rank, *ranks)?;
                Ok(vec![work_among(&*ranks, |ranks| work(device, ranks))?])
            }
            Self::Gpus(_) => unreachable!("opened before it is used"),
        }
    }

    /// Lets ranks work on problems of their own, of `b`, each on its device, and returns what they return, in the order of the problems.
    /// The last devices have none if there are fewer problems.
    pub fn run_problems<T: Send>(
        &self,
        b: usize,
        work: impl Fn(&Device, Range<usize>, &dyn Ranks) -> Result<T> + Sync,
    ) -> Result<Vec<T>> {
        if self.is_launched() {
            let with = "a batch: each process fits problems of its own without them".into();
            return Err(Error::Conflict { argument: "devices", got: "Devices::Launched".into(), with });
        }
        let devices = &self.devices()[..b.min(self.devices().len())];
        run_on(devices, |device, ranks| work(device, share(ranks.rank(), ranks.count(), b), ranks))
    }

    /// A fit with the labels of all rows, where other processes have some of them.
    pub fn gather_labels(&self, fit: Fit, ranks: &dyn Ranks) -> Result<Fit> {
        if !self.is_launched() {
            return Ok(fit);
        }
        let own = fit.labels.flatten_all()?.to_vec1::<u32>()?;
        let mut parts = vec![vec![]; ranks.count()];
        let most = ranks.gather(vec![own.len() as f64])?.concat().into_iter().fold(0.0, f64::max) as usize;
        for first in (0..most).step_by(LABELS_AT_ONCE) {
            let labels = &own[first.min(own.len())..(first + LABELS_AT_ONCE).min(own.len())];
            let labels = ranks.gather(labels.iter().map(|&label| f64::from(label)).collect())?;
            for (part, labels) in parts.iter_mut().zip(labels) {
                part.extend(labels.into_iter().map(|label| label as u32));
            }
        }
        let all = parts.concat();
        let n = all.len();
        Ok(Fit { labels: Tensor::from_vec(all, n, &Device::Cpu)?, ..fit })
    }
}

/// A rank for each of these devices, for a thread each, which outlives the call: sums go through NCCL where each is another GPU and there is
/// NCCL, else through the host's memory.
pub(crate) fn join_threads(devices: &[Device]) -> Result<Vec<Box<dyn Ranks + Send>>> {
    let Some(first) = devices.first() else { return Ok(vec![]) };
    let attendees = Attendee::all(devices.len()).into_iter();
    let Some(at) = primitives::rendezvous(first)?.filter(|_| all_differ(devices)) else {
        return Ok(attendees.map(|attendee| Box::new(attendee) as Box<dyn Ranks + Send>).collect());
    };
    // Each waits for the others.
    thread::scope(|scope| {
        let join = |(device, attendee)| scope.spawn(move || primitives::join_for_long(device, at, Box::new(attendee)));
        let threads: Vec<_> = devices.iter().zip(attendees).map(join).collect();
        let ended: Vec<_> = threads.into_iter().map(|thread| thread.join()).collect();
        ended.into_iter().map(|joined| joined.unwrap_or_else(|panic| resume_unwind(panic))).collect()
    })
}

/// The rank of this process, of those that a launcher has started, and its GPU.
pub(crate) fn join_process() -> Result<(Device, Box<dyn Ranks + Send>)> {
    match Place::Gpus(Devices::Launched).open()? {
        Place::Launched(device, LaunchedRank { rank, ranks }) => {
            let joined = primitives::join_launched(&device, rank, ranks)?;
            Ok((device, joined))
        }
        _ => unreachable!("launched processes are opened as such"),
    }
}

/// Lets a rank work on each of these devices.
fn run_on<T: Send>(devices: &[Device], work: impl Fn(&Device, &dyn Ranks) -> Result<T> + Sync) -> Result<Vec<T>> {
    run_ranks(devices.len(), |ranks| {
        let device = &devices[ranks.rank()];
        let done = work(device, ranks);
        // The thread has queued on a stream of its own. What has failed before says more than that the stream has.
        let waited = device.synchronize();
        done.and_then(|done| Ok(waited.map(|()| done)?))
    })
}

/// Lets a rank work, and says that it is done if it is.
fn work_among<T>(ranks: &dyn Ranks, work: impl FnOnce(&dyn Ranks) -> Result<T>) -> Result<T> {
    work(ranks).inspect(|_| ranks.done())
}

/// Refuses ranks that have other settings than the first, or start from another state than it does.
pub(super) fn agree(ranks: &dyn Ranks, fingerprint: &Fingerprint, start: Option<&State>) -> Result<()> {
    let state = start.map(|s| (s.run, s.iteration, s.added.as_ref().map_or(0, |added| added.rows)));
    let state = ("run, iteration and rows of its start", format!("{:?}", state.unwrap_or_default()));
    let settings = fingerprint.settings().map(|(name, value)| (name, value.to_string()));
    let own: Vec<_> = settings.chain([state]).collect();
    let text = own.iter().map(|(_, value)| value.as_str()).collect::<Vec<_>>().join("\0");
    let all = ranks.gather(text.bytes().map(f64::from).collect())?;
    let all: Vec<Vec<u8>> = all.into_iter().map(|text| text.into_iter().map(|byte| byte as u8).collect()).collect();
    let text = |rank: usize| String::from_utf8_lossy(&all[rank]).into_owned();
    let Some(rank) = (1..all.len()).find(|&rank| all[rank] != all[0]) else { return Ok(()) };
    let (got, expected) = (text(rank), text(0));
    let mut values = own.iter().map(|(name, _)| *name).zip(got.split('\0').zip(expected.split('\0')));
    let (what, (got, expected)) = values.find(|(_, (a, b))| a != b).unwrap_or(("settings", (&got, &expected)));
    let (path, got, expected) = (format!("rank {rank} of {}", ranks.count()), got.into(), expected.into());
    Err(Error::Mismatch { path, what: what.into(), got, expected })
}

/// The sum, modulo 2^64, of a number of each rank.
pub(super) fn sum_of(ranks: &dyn Ranks, mine: u64) -> Result<u64> {
    // Halves are exact in f64.
    let halves = ranks.gather(vec![(mine >> 32) as f64, f64::from(mine as u32)])?;
    Ok(halves.iter().fold(0u64, |sum, halves| sum.wrapping_add(((halves[0] as u64) << 32) + halves[1] as u64)))
}

/// The labels of several ranks as one tensor. There may be gigabytes of them, more than a thread should copy alone.
pub(super) fn joined(parts: &[&Tensor]) -> Result<Tensor> {
    const AT_ONCE: usize = 1 << 20;
    if let [all] = parts {
        return Ok((*all).clone());
    }
    let n = parts.iter().map(|part| part.elem_count()).sum();
    host::room("fit_stream", n, DType::U32, &Device::Cpu)?;
    // Nobody touches the pages of zeros before the threads do.
    let mut all = vec![0u32; n];
    let storages: Vec<_> = parts.iter().map(|part| part.storage_and_layout()).collect();
    let (mut room, mut copies) = (&mut all[..], vec![]);
    for (storage, layout) in &storages {
        let Storage::Cpu(labels) = &**storage else { unreachable!("labels of a stream are on the CPU") };
        let labels = &labels.as_slice::<u32>()?[layout.start_offset()..][..layout.shape().elem_count()];
        let (own, rest) = room.split_at_mut(labels.len());
        copies.extend(own.chunks_mut(AT_ONCE).zip(labels.chunks(AT_ONCE)));
        room = rest;
    }
    host::for_each(
        copies,
        AT_ONCE,
        || (),
        |(), (to, from)| {
            to.copy_from_slice(from);
            Ok(())
        },
    )?;
    drop(storages);
    Ok(Tensor::from_vec(all, n, &Device::Cpu)?)
}

/// Labels that ranks send each other at a time.
const LABELS_AT_ONCE: usize = 1 << 22;

/// Whether each is another GPU, as NCCL asks for.
fn all_differ(devices: &[Device]) -> bool {
    let locations: Vec<_> = devices.iter().map(Device::location).collect();
    (1..locations.len()).all(|i| !locations[..i].contains(&locations[i]))
}

/// The rows of a rank, of `n`: as many as others have, but for one.
pub(super) fn rows_of(ranks: &dyn Ranks, n: usize) -> Range<usize> {
    share(ranks.rank(), ranks.count(), n)
}

fn share(rank: usize, ranks: usize, n: usize) -> Range<usize> {
    let first = |rank: usize| (n as u128 * rank as u128 / ranks as u128) as usize;
    first(rank)..first(rank + 1)
}
