//! Requests: plain values by which an op is asked.

use crate::{
    error::Result,
    kept::{KeptBounds, KeptRows, KeptSums},
    metric::Metric,
    operand::Readable,
    plan::{assign::AssignPlan, on_chip::OnChip, skip::NearGroups, update::UpdatePlan},
    rng::Draw,
    rows::Rows,
};
use candle_core::Tensor;
use std::sync::Mutex;

/// The progress of a fit's problems.
pub(crate) struct Progress {
    /// The iteration in which each problem converged, u32 `(b,)`; `u32::MAX` where it has not.
    pub stop: Tensor,
    /// The squared shift at which a problem has converged, f64 `(b,)`.
    pub threshold: Tensor,
    /// The problems that go on to the next even and to the next odd iteration, u32 `(2, b + 1)`: their number, then
    /// themselves. CUDA's; on the CPU `stop` says enough.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    pub going: Tensor,
}

/// An iteration of a fit. It leaves problems alone that have converged before it.
#[derive(Clone, Copy)]
pub(crate) struct Turn<'a> {
    pub progress: &'a Progress,
    pub iteration: usize,
}

/// The terms that rows are added up as: their values, each times the row's factor.
pub(crate) struct Summands {
    /// The factor of each row, f64 `(b, n)`; none for 1.
    pub row_scale: Option<Tensor>,
    /// A bound on the magnitude of the terms, f64 `(b,)`; on the CPU infinity where none is known.
    pub max_abs: Tensor,
    /// No row before this one has a NaN or an infinity, u32 `(b,)`; `u32::MAX` where none has.
    pub first_nonfinite: Tensor,
    /// The largest factor, f64 `(b,)`, where factors are weights.
    pub max_weight: Option<Tensor>,
    /// Whether the host knows that no row has a NaN or an infinity.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    pub finite: bool,
}

/// A reduction says what becomes of the terms of a cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reduction {
    /// Their sum divided by the cluster's weight: by the sum of the factors, which have to be weights, or the number of rows.
    Mean,
    /// Their sum divided by its norm.
    Direction,
    /// Their sum.
    Sum,
    /// The smallest value of each column that at least half of the weight does not exceed. Factors are weights.
    Median,
}

impl Reduction {
    /// The reduction that makes a metric's centroids.
    pub fn of(metric: Metric) -> Self {
        match metric {
            Metric::Cosine => Self::Direction,
            Metric::Manhattan => Self::Median,
            _ => Self::Mean,
        }
    }
}

/// Rows `(b, n, d)`, and centroids that each is assigned to the nearest of.
#[derive(Clone, Copy)]
pub(crate) struct Assignment<'a> {
    pub plan: AssignPlan,
    pub x: &'a Rows<'a>,
    pub c: &'a Rows<'a>,
    pub metric: Metric,
    pub turn: Option<Turn<'a>>,
    /// What the last assignment of these rows has left for this one, whose labels have to be those it has made.
    #[cfg_attr(feature = "cuda", allow(dead_code))]
    pub bounds: Option<&'a KeptBounds>,
    /// How this one and those before it in a fit, by the same memory, score near groups of centroids on a GPU.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    pub near: Option<NearGroups>,
}

/// Labels, and the order that brings clusters together. Cluster `j` is `order[offsets[j]..offsets[j + 1]]`.
#[derive(Clone, Debug)]
pub(crate) struct Order {
    /// u32 `(b, n)`, below `k`.
    pub labels: Tensor,
    /// Rows by their labels, u32 `(b, n)`: those of a cluster ascending, unless only sums are wanted.
    pub order: Tensor,
    /// u32 `(b, k + 1)`.
    pub offsets: Tensor,
}

impl Order {
    /// From what has two dimensions of batch and heads, each head a problem.
    pub fn of_heads(labels: &Tensor, order: &Tensor, offsets: &Tensor) -> Result<Self> {
        Ok(Self { labels: labels.flatten(0, 1)?, order: order.flatten(0, 1)?, offsets: offsets.flatten(0, 1)? })
    }

    /// The number of clusters.
    pub fn k(&self) -> usize {
        self.offsets.dims()[1] - 1
    }
}

/// Which rows an update finds in which cluster.
#[derive(Clone, Copy)]
pub(crate) enum Labels<'a> {
    /// By labels, u32 `(b, n)`, below `k`, that it sorts itself: only those of problems that have not converged, and the rows of a
    /// cluster in any order.
    Unsorted(&'a dyn Readable),
    /// By an order that is there already. The result has the same bits.
    Sorted(&'a Order),
}

impl<'a> Labels<'a> {
    /// The labels themselves.
    pub fn readable(self) -> &'a dyn Readable {
        match self {
            Self::Unsorted(labels) => labels,
            Self::Sorted(order) => &order.labels,
        }
    }
}

/// Rows to be reduced by clusters.
pub(crate) struct Update<'a> {
    pub plan: UpdatePlan,
    pub x: &'a Rows<'a>,
    pub summands: &'a Summands,
    /// Without labels all rows are in one cluster.
    pub labels: Option<Labels<'a>>,
    pub reduction: Reduction,
    pub turn: Option<Turn<'a>>,
    /// The sums that the last update of these rows has left for this one. The CPU's.
    pub kept: Option<&'a Mutex<KeptSums>>,
}

/// Sums by cluster that blocks of rows and ranks add to. They are integers, the digits of Kulisch accumulators, so that sums of
/// other rows merge by addition.
pub(crate) struct Accumulator {
    /// i64 `(planes, b, k, d + 1, 2)`: of each column and, last, of the weight, the low and the high half of an integer of each
    /// plane of the grid ([`Grid`](crate::fixed::Grid)). Zeros whenever nothing has been added since the last finish.
    pub sums: Tensor,
    /// A bound on the magnitude of all terms, f64 `(b,)`.
    pub max_abs: Tensor,
    /// The largest factor, f64 `(b,)`, where factors are weights.
    pub max_weight: Option<Tensor>,
    /// A bound on the rows that are added to a problem.
    pub rows: usize,
}

/// Sums that are to become centroids, once all rows have been added.
pub(crate) struct Finish<'a> {
    pub sums: &'a Accumulator,
    pub reduction: Reduction,
    pub turn: Option<Turn<'a>>,
}

/// All iterations of a fit, from the `centroids` `(b, k, d)` that are there, and its last `labels`, u32 `(b, n)`.
pub(crate) struct OnChipFit<'a> {
    pub plan: &'a OnChip,
    pub x: &'a Rows<'a>,
    pub summands: &'a Summands,
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    pub metric: Metric,
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    pub reduction: Reduction,
    pub progress: &'a Progress,
    pub max_iters: usize,
    pub centroids: &'a Tensor,
    pub labels: &'a Tensor,
}

/// A block of k-means++ (Arthur and Vassilvitskii 2007): rows arrive by their distances to all seeds before them, and those that become
/// seeds go to the next columns of `chosen`, where there is one left.
pub(crate) struct KmeansppBlock<'a> {
    pub x: &'a Rows<'a>,
    /// The distance of each row to the nearest seed ([`spread`](crate::spread)), -1 of seeds, and when it is drawn next, f64 `(b, 2, n)`. Nothing is
    /// in it before the first block, and after the last one nothing of use.
    pub rows: &'a Tensor,
    /// The seeds of each problem, u32 `(b,)`: zeros before the first block.
    pub taken: &'a Tensor,
    /// The rows' norms, f64 `(b, n)`, by cosine.
    pub norms: Option<&'a Tensor>,
    /// f64 `(b, n)`. Rows that weigh nothing are drawn only where nothing else is left.
    pub weights: Option<&'a Tensor>,
    /// u32 `(b, count)`.
    pub chosen: &'a Tensor,
    /// The number of the block; the first is of one draw by weight alone.
    pub block: usize,
    /// The draws of a block but the first at most.
    pub draws: usize,
    /// Of greedy k-means++.
    pub trials: Option<Trials<'a>>,
    pub metric: Metric,
    pub draw: Draw,
    /// Of the blocks of these rows, by this metric.
    pub kept: &'a KeptRows,
}

/// What blocks of greedy k-means++ go by: several rows are tried for each seed.
pub(crate) struct Trials<'a> {
    /// The rounds that the next block of each problem draws for, u32 `(b,)`: ones before the first. A round chooses a seed.
    pub rounds: &'a Tensor,
    /// The rows that a round has tried whose end a block has not seen, u32 `(b, trials)`, and `u32::MAX` behind them.
    pub tried: &'a Tensor,
}

/// A cache of keys and values, and how the queries of one token read it.
pub(crate) struct Attention<'a> {
    /// `(b, q_heads, d)`, of the keys' dtype, as all floats but the outcome's inside.
    pub q: &'a Tensor,
    /// `(b, heads, room, d)`, of which the first `tokens` are there.
    pub keys: &'a Tensor,
    /// `(b, heads, room, width)`.
    pub values: &'a Tensor,
    pub tokens: usize,
    pub scale: f64,
    /// Without clusters all tokens are read.
    pub clusters: Option<Clustered<'a>>,
}

/// Rows as whole numbers.
#[derive(Clone, Copy)]
pub(crate) struct Codes<'a> {
    /// u8 `(.., n, d)`: the numbers and [`ZERO`](Self::ZERO).
    pub bytes: &'a Tensor,
    /// `(.., n)`, f32, or f64 beside f64: what a row's numbers are multiplied by.
    pub scales: &'a Tensor,
}

impl Codes<'_> {
    pub const ZERO: u8 = 128;
    /// The largest whole number that a byte holds beside its negative.
    pub const MOST: f64 = 127.0;
}

/// The clusters of a cache, and which of their tokens are read. All tokens before and after them are.
#[derive(Clone, Copy)]
pub(crate) struct Clustered<'a> {
    /// Tokens before the clustered ones.
    pub sinks: usize,
    /// The clustered tokens of each head, counted from the first of them.
    pub order: &'a Order,
    /// `(b, heads, k, d)`.
    pub mean_keys: Codes<'a>,
    /// `(b, heads, k, width)`.
    pub mean_values: Codes<'a>,
    /// The standard deviation of a cluster's keys from their mean, in a column: `(b, heads, k)`, of the scales' dtype.
    pub spreads: &'a Tensor,
    /// A cluster ranks by the score of its mean key and this times the query's norm and the cluster's spread, if that is finite.
    pub reach: f64,
    /// Clustered tokens that are read, fewer than there are.
    pub budget: usize,
    /// Whether the query heads of a key head choose together.
    pub shared: bool,
    /// Whether clusters stand in for their tokens that are not read.
    pub estimate: bool,
}

/// A cache whose clustered tokens are product codes, and how the queries of one token read it.
pub(crate) struct CodedAttention<'a> {
    /// `(b, q_heads, d)`, of the dtype of everything that is no code.
    pub q: &'a Tensor,
    /// Tokens that are no codes, `(b, heads, room, d)`, of which the first `tokens` are there and are read.
    pub keys: &'a Tensor,
    /// `(b, heads, room, width)`.
    pub values: &'a Tensor,
    pub tokens: usize,
    pub scale: f64,
    pub coded_keys: Coded<'a>,
    pub coded_values: Coded<'a>,
    /// Where the codes of each cluster begin, u32 `(b, heads, k + 1)`.
    pub offsets: &'a Tensor,
    /// As [`Clustered`] has them.
    pub spreads: &'a Tensor,
    pub reach: f64,
    /// Coded tokens that are read, at most all there are.
    pub budget: usize,
    /// Whether the query heads of a key head choose together.
    pub shared: bool,
    /// Whether clusters stand in for their tokens that are not read.
    pub estimate: bool,
}

/// The keys or the values of a [`CodedAttention`], cluster by cluster: a row is its cluster's mean and an entry for each of its pieces.
#[derive(Clone, Copy)]
pub(crate) struct Coded<'a> {
    /// u8 `(b, heads, m, bytes)`: a code for each piece, of 8 bits or of 4, the earlier piece in the low ones.
    pub codes: &'a Tensor,
    /// `(b, heads, pieces, entries, columns)`, of 256 or 16 entries, or `(b, heads, 1, entries, columns)` for all pieces.
    pub entries: &'a Tensor,
    /// The mean rows, `(b, heads, k, d)`.
    pub means: Codes<'a>,
    /// u8 `(b, heads, m, 1)`: code `i` multiplies a row's entries by `2^(-i / GAINS_PER_OCTAVE)`.
    pub gains: Option<&'a Tensor>,
}

/// Queries, keys and values, and how the queries read them.
pub(crate) struct Routed<'a> {
    /// `(b, heads, m, d)`, of the keys' dtype.
    pub q: &'a Tensor,
    /// `(b, kv_heads, n, d)`: sinks, then the grouped tokens, then others, which are the last.
    pub keys: &'a Tensor,
    pub values: &'a Tensor,
    pub sinks: usize,
    pub groups: Option<&'a RoutedGroups>,
    /// Whether the queries are those of the last `m` tokens, which see what comes up to themselves.
    pub causal: bool,
    pub scale: f64,
    /// Of the grouped tokens those that have this share of the estimated attention, but at least and at most so many.
    pub share: f64,
    pub least: usize,
    pub most: usize,
    /// Whether the groups stand in for their tokens that are not read.
    pub estimate: bool,
}

/// The groups of queries and keys, a problem a head.
pub(crate) struct RoutedGroups {
    /// Counted from the first grouped token.
    pub keys: Order,
    /// `(b, kv_heads, k, d)`.
    pub mean_keys: Tensor,
    pub mean_values: Tensor,
    pub queries: Order,
    /// The queries that choose for each group, `(b, heads, any, d)`, and whose they are, if not those of the group.
    pub choosers: Option<(Tensor, Order)>,
}

/// A matrix of weights that are looked up: a weight is the level that its code names in a table of its row, times
/// the scale of its group.
///
/// The codes of [`BLOCK`](Self::BLOCK) columns of an output lie in `8 * bits` bytes. Eight fields of as many bits as a code make a number,
/// the first in the low bits; field `i` of number `t` is the code of column `8 i + t`. Codes of three bits are fields of two for their low
/// bits, in numbers of 16, and after these fields of one, in bytes.
#[derive(Clone, Copy)]
pub(crate) struct LutMatrix<'a> {
    /// Columns that count; those after them are zeros.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    pub inputs: usize,
    /// Of a code: 2, 3 or 4.
    pub bits: usize,
    /// u8 `(outputs, bytes)`: whole blocks.
    pub codes: &'a Tensor,
    /// f16 `(outputs, tables, 2^bits)`: each for as many blocks. Or `(1, 1, 2^bits)`: one for all outputs.
    pub levels: &'a Tensor,
    /// f16 `(outputs, groups)`: each for as many blocks.
    pub scales: &'a Tensor,
    pub outliers: Option<Outliers<'a>>,
}

/// What some weights of each output are more than their levels say.
#[derive(Clone, Copy)]
pub(crate) struct Outliers<'a> {
    /// u32 `(outputs, any)`: different ones of an output.
    pub columns: &'a Tensor,
    /// f16.
    pub values: &'a Tensor,
}

impl LutMatrix<'_> {
    /// Columns whose codes lie together.
    pub const BLOCK: usize = 64;

    /// Tables of levels that an output has of its own; 0 if all outputs share one.
    pub fn tables(&self) -> usize {
        match *self.levels.dims() {
            [outputs, tables, _] if outputs == self.codes.dims()[0] => tables,
            _ => 0,
        }
    }

    /// Columns of an output, whole blocks.
    pub fn columns(&self) -> usize {
        self.codes.dims()[1] * 8 / self.bits
    }
}
