//! Replicas of a model, each of which trains on rows of its own.

use crate::{
    error::{Error, Result},
    primitives,
    problem::{check_device, check_dtype},
    row_weights::{self, or_one, Clusters, RowWeights},
    rows::Rows,
};
use candle_core::{DType, Tensor};
use std::{fmt, sync::Arc};

/// The replicas of a model that trains on several devices, each on rows of its own (data parallelism): threads or processes with
/// [`ReplicaRank`](crate::nn::ReplicaRank), or what the caller has between them, such as MPI. An [`EmaCodebook`](crate::nn::EmaCodebook) that is [told of them](crate::nn::EmaCodebook::replicas) learns from the rows of all.
///
/// ```
/// use candle_core::{Device, Result, Tensor};
/// use candle_flash_kmeans::{nn::{Codebook, Ema, EmaCodebook, Replicas}, Metric};
/// use std::sync::{Arc, Barrier, Mutex};
///
/// /// A thread among others.
/// struct Thread(usize, Arc<(Barrier, Mutex<Vec<Tensor>>)>);
///
/// impl Replicas for Thread {
///     fn rank(&self) -> usize {
///         self.0
///     }
///     fn count(&self) -> usize {
///         2
///     }
///     fn all_reduce(&self, mine: &Tensor) -> Result<Tensor> {
///         let (barrier, all) = &*self.1;
///         all.lock().unwrap().push(mine.clone());
///         barrier.wait();
///         let sum = { let all = all.lock().unwrap(); &all[0] + &all[1] }?;
///         if barrier.wait().is_leader() {
///             all.lock().unwrap().clear();
///         }
///         barrier.wait();
///         Ok(sum)
///     }
/// }
///
/// let start = Codebook::new(&Tensor::new(&[[0f32], [10.]], &Device::Cpu)?, Metric::default())?;
/// let between = Arc::new((Barrier::new(2), Mutex::new(vec![])));
/// let train = |rank: usize| {
///     let codebook = EmaCodebook::new(start.clone(), Ema { decay: 0., eps: 0., ..Ema::default() })?;
///     let mut codebook = codebook.replicas(Arc::new(Thread(rank, between.clone())))?;
///     codebook.step(&Tensor::new(&[[rank as f32], [9.]], &Device::Cpu)?)?;
///     Ok::<_, candle_flash_kmeans::Error>(codebook.codebook().centroids().to_vec2::<f32>()?)
/// };
/// std::thread::scope(|scope| {
///     for thread in [0, 1].map(|rank| scope.spawn(move || train(rank))) {
///         assert_eq!(thread.join().unwrap().unwrap(), [[0.5], [9.]]); // of rows 0 and 1, and of 9 twice
///     }
/// });
/// # Ok::<_, candle_flash_kmeans::Error>(())
/// ```
pub trait Replicas: Send + Sync {
    /// The number of this replica, from 0.
    fn rank(&self) -> usize;

    /// The number of replicas.
    fn count(&self) -> usize;

    /// The sum over all replicas, element by element, of what each has called this with: f64, of the same shape on all, on this replica's device.
    /// Every replica has to get the same bits, or codebooks drift apart; an all-reduce that adds an element up in one place and sends
    /// it to all gives them. On a GPU the work that writes `mine` is queued on the stream of the tensor's device.
    ///
    /// # Errors
    /// What it returns ends the step, and leaves the codebook as it is. A replica whose step fails before it comes here does not come,
    /// which the others should notice.
    fn all_reduce(&self, mine: &Tensor) -> candle_core::Result<Tensor>;
}

impl fmt::Debug for dyn Replicas {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Replicas").field("rank", &self.rank()).field("count", &self.count()).finish()
    }
}

/// Whose rows a codebook learns from: its own, or those of all replicas, in the order of their ranks.
#[derive(Clone, Debug, Default)]
pub(super) struct Batches(Option<Arc<dyn Replicas>>);

impl Batches {
    pub fn of_all(replicas: Arc<dyn Replicas>) -> Result<Self> {
        let (rank, count) = (replicas.rank(), replicas.count());
        match rank < count {
            true => Ok(Self(Some(replicas))),
            false => Err(Error::Range { argument: "rank", got: rank, min: 0, max: count.saturating_sub(1) }),
        }
    }

    /// The clusters of all batches.
    pub fn clusters(&self, mine: Clusters) -> Result<Clusters> {
        let Some(replicas) = &self.0 else { return Ok(mine) };
        let weights = sum(&**replicas, &mine.weights)?;
        // Means by their shares of the weight, because sums of rows could overflow.
        let share = (&mine.weights / or_one(&weights)?)?;
        let means = sum(&**replicas, &mine.means.broadcast_mul(&share.unsqueeze(2)?)?)?;
        Ok(Clusters { means, weights })
    }

    /// The rows of all batches, f64 `(b, k, d)`, that [`RowWeights::at_shares`] would choose, were they one, and whether any counts,
    /// u8 `(b, 1)`.
    pub fn rows_at(&self, shares: &Tensor, rows: &Rows, weights: &RowWeights) -> Result<(Tensor, Tensor)> {
        let Some(replicas) = &self.0 else {
            let (index, any) = weights.at_shares(shares)?;
            return Ok((primitives::gather(rows, &index)?, any));
        };
        let (order, own) = weights.counting()?;
        let (rank, zeros) = (replicas.rank(), own.zeros_like()?);
        let column = |other| if other == rank { &own } else { &zeros };
        let counts = sum(&**replicas, &Tensor::cat(&(0..replicas.count()).map(column).collect::<Vec<_>>(), 1)?)?;
        let all = counts.sum_keepdim(1)?;
        let before = if rank == 0 { zeros.clone() } else { counts.narrow(1, 0, rank)?.sum_keepdim(1)? };
        let places = row_weights::places(shares, &all)?.floor()?.broadcast_sub(&before)?;
        let mine = (places.ge(0.0)? * places.broadcast_lt(&own)?)?;
        let index = mine.where_cond(&places, &places.zeros_like()?)?.to_dtype(DType::U32)?;
        let drawn = primitives::gather(rows, &order.gather(&index, 1)?)?;
        // One replica has each row, and the others add zeros to it.
        let drawn = mine.unsqueeze(2)?.broadcast_as(drawn.shape())?.where_cond(&drawn, &drawn.zeros_like()?)?;
        Ok((sum(&**replicas, &drawn)?, all.gt(0.0)?))
    }
}

fn sum(replicas: &dyn Replicas, mine: &Tensor) -> Result<Tensor> {
    let argument = "all_reduce";
    let sum = replicas.all_reduce(&mine.contiguous()?)?;
    if sum.dims() != mine.dims() {
        return Err(Error::Shape { argument, got: sum.dims().to_vec(), expected: mine.dims().to_vec() });
    }
    check_dtype(argument, &sum, DType::F64)?;
    check_device(argument, &sum, mine.device())?;
    Ok(sum)
}
