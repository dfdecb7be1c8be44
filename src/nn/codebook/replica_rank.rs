//! Replicas that are threads or processes.

use super::replicas::Replicas;
use crate::{
    error::Result,
    problem::check_dtype,
    ranks::Ranks,
    scale::devices::{join_process, join_threads},
};
use candle_core::{DType, Device, Tensor};
use std::{
    fmt,
    sync::{Mutex, PoisonError},
};

/// A replica among others that are threads of this process or processes, on one machine or many.
///
/// Numbers of all replicas are brought together, and each adds them up in the order of their ranks: all have the same bits by the order of
/// additions alone, whatever way NCCL takes between them, for the memory of as many tensors as there are replicas.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_flash_kmeans::{nn::{Codebook, Ema, EmaCodebook, ReplicaRank, Replicas}, Error, Metric};
/// use std::{sync::Arc, thread};
///
/// let start = Codebook::new(&Tensor::new(&[[0f32], [10.]], &Device::Cpu)?, Metric::default())?;
/// let train = |replica: ReplicaRank| {
///     let replica = Arc::new(replica);
///     let codebook = EmaCodebook::new(start.clone(), Ema { decay: 0., eps: 0., ..Ema::default() })?;
///     let mut codebook = codebook.replicas(replica.clone())?;
///     codebook.step(&Tensor::new(&[[replica.rank() as f32], [9.]], &Device::Cpu)?)?;
///     replica.finish();
///     Ok::<_, Error>(codebook.codebook().centroids().to_vec2::<f32>()?)
/// };
/// let replicas = ReplicaRank::threads(&[Device::Cpu, Device::Cpu])?;
/// thread::scope(|scope| {
///     let threads: Vec<_> = replicas.into_iter().map(|replica| scope.spawn(|| train(replica))).collect();
///     for thread in threads {
///         assert_eq!(thread.join().unwrap().unwrap(), [[0.5], [9.]]); // of rows 0 and 1, and of 9 twice
///     }
/// });
/// # Ok::<_, Error>(())
/// ```
pub struct ReplicaRank {
    rank: usize,
    count: usize,
    /// A replica asks for one sum at a time.
    ranks: Mutex<Box<dyn Ranks + Send>>,
}

impl ReplicaRank {
    /// A replica for each of these devices, in their order, each for a thread of its own. With the feature `nccl` numbers go through NCCL if each
    /// is another GPU; else they go through the host's memory, and devices may be the same. Each takes tensors of its own device.
    ///
    /// # Errors
    /// Fails where NCCL does.
    pub fn threads(devices: &[Device]) -> Result<Vec<Self>> {
        Ok(join_threads(devices)?.into_iter().map(Self::new).collect())
    }

    /// The replica of this process, of those that `torchrun`, `srun` or `mpirun` has started, as for
    /// [`Devices::Launched`](crate::Devices::Launched), and its GPU, whose tensors it takes. Numbers go through NCCL.
    ///
    /// # Errors
    /// Refuses a process that no launcher has started, a machine without GPUs and a build without the feature `nccl`. Fails where NCCL does,
    /// as when another process does not start within a minute.
    pub fn launched() -> Result<(Self, Device)> {
        let (device, ranks) = join_process()?;
        Ok((Self::new(ranks), device))
    }

    fn new(ranks: Box<dyn Ranks + Send>) -> Self {
        Self { rank: ranks.rank(), count: ranks.count(), ranks: Mutex::new(ranks) }
    }

    /// Says that this replica needs no more sums, as at the end of a training. One that is dropped before has failed: whoever waits for it
    /// gets an error.
    pub fn finish(&self) {
        self.ranks.lock().unwrap_or_else(PoisonError::into_inner).done();
    }
}

impl fmt::Debug for ReplicaRank {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReplicaRank").field("rank", &self.rank).field("count", &self.count).finish()
    }
}

impl Replicas for ReplicaRank {
    fn rank(&self) -> usize {
        self.rank
    }

    fn count(&self) -> usize {
        self.count
    }

    fn all_reduce(&self, mine: &Tensor) -> candle_core::Result<Tensor> {
        let sum = || -> Result<Tensor> {
            check_dtype("all_reduce", mine, DType::F64)?;
            self.ranks.lock().unwrap_or_else(PoisonError::into_inner).sum(&mine.contiguous()?)
        };
        Ok(sum()?)
    }
}
