//! Every tile number, in one place: `build.rs` and `scripts/kernel-flags.sh` read this file and hand the kernels each number as a
//! macro of the same name.

/// Static shared memory of kernels that ask for more at their launch, at most, in bytes (`scripts/check-kernels.sh` holds them to it).
pub const STATIC_SHARED: usize = 4096;

/// Rows that one CPU task scores against a block of centroids: the packed rows and their scores stay in L2.
pub const CPU_ROWS: usize = 256;
/// Centroids in one block of CPU scores.
pub const CPU_CENTROIDS: usize = 512;
/// Rows that the matrix unit of a CPU scores at a time: two of its tiles.
pub const AMX_ROWS: usize = 32;
/// Centroids that it scores them against at a time: the scores stay in L1.
pub const AMX_CENTROIDS: usize = 256;
/// Most rows that one CPU task looks up in their bounds, and gathers by the groups that they need.
pub const CPU_SKIP_ROWS: usize = 1024;
/// Bytes of those that are gathered: they stay in L2.
pub const CPU_SKIP_BYTES: usize = 1 << 20;
/// One row of so many says what all need.
pub const CPU_SAMPLE: usize = 32;
/// Most snapshots of centroids from which bounds count moves; a power of two.
pub const CPU_SNAPSHOTS: usize = 16;
/// Most centroids of a group to which rows keep bounds.
pub const CPU_GROUP: usize = 64;
/// Sorted rows that one CPU task sums.
pub const CPU_SUM_ROWS: usize = 8192;

/// Rows of a cluster that are tried together as terms of one f64 sum.
pub const CPU_SUM_BLOCK: usize = 64;
/// The most rows of a cluster whose sums are tried in f64 as they are.
pub const CPU_SUM_WHOLE: usize = 4 * CPU_SUM_BLOCK;

/// An update adds only the rows that have changed their cluster where they are at most one of so many.
pub const CPU_CHANGED: usize = 4;

/// Tokens, or means, that one CPU task of attention reads.
pub const CPU_ATTEND_ROWS: usize = 512;

/// Rows that weights which are looked up are multiplied with as they are decoded; more are multiplied with a decoded tile.
pub const CPU_LUT_ROWS: usize = 4;
/// Outputs of that tile.
pub const CPU_LUT_OUTPUTS: usize = 32;

/// Rows of a thread block's tile in `assign_simt.cu`.
pub const SIMT_ROWS: usize = 64;
/// Centroids of a thread block's tile in `assign_simt.cu`.
pub const SIMT_CENTROIDS: usize = 64;
/// Columns staged in shared memory at a time in `assign_simt.cu`.
pub const SIMT_COLUMNS: usize = 16;
/// Most columns that `assign_narrow.cu` is for.
pub const NARROW_COLUMNS: usize = 8;
/// Rows that a thread of it keeps, in f32; half as many in f64.
pub const NARROW_ROWS: usize = 4;
/// Threads of its block.
pub const NARROW_THREADS: usize = 128;
/// Such blocks that a multiprocessor is given, over some waves.
pub const NARROW_BLOCKS: usize = 64;
/// Centroids of a group, of which it keeps the best score alone.
pub const NARROW_GROUP: usize = 8;
/// Rows of its tile.
pub const NARROW_TILE: usize = 1024;
/// Shared memory that its block takes at most, in bytes: centroids and the table that finds equal ones.
pub const NARROW_SHARED: usize = 49_152;
/// The same with centroids for tensor cores.
pub const NARROW_TENSOR_SHARED: usize = 73_728;
/// Centroids that each place of a row on tensor cores has two of (`narrow_tensor.cuh`).
pub const NARROW_ROUND: usize = 64;
/// Most threads of a block of `fit_narrow.cu`, for rows of more than four columns.
pub const FIT_THREADS_8: usize = 320;
/// The same for four columns (or three), which leave registers for more.
pub const FIT_THREADS_4: usize = 512;
/// And for one or two, of blocks of which a multiprocessor has registers for two.
pub const FIT_THREADS_2: usize = 256;
/// Problems that are enough for a block each.
pub const FIT_PROBLEMS: usize = 64;
/// Rows times centroids of a problem that needs no more than a block.
pub const FIT_SMALL: usize = 65_536;
/// Threads of `fit_line.cu` that a multiprocessor should hold.
pub const LINE_THREADS: usize = 768;
/// Shared memory of a row of its block, in bytes: its prefix sum, its value and its number.
pub const LINE_BYTES: usize = 14;
/// And of a problem beside them, at most.
pub const LINE_FIXED: usize = 64;
/// Threads of a block of `fit_resident.cu`.
pub const TEAM_THREADS: usize = 512;
/// Rows that such a block is to have at least, where several share a problem.
pub const TEAM_ROWS: usize = 64;
/// Most problems that a team does one after another.
pub const TEAM_TURNS: usize = 4;
/// Columns of a line: rows and centroids lie on chip in lines of 128 bytes.
pub const TEAM_LINE: usize = 64;
/// Rows that one warp searches at a time, and centroids that it scores at a time.
pub const TEAM_GROUP: usize = 32;
/// Most columns that it is for.
pub const TEAM_COLUMNS: usize = 256;
/// Most centroids that it is for.
pub const TEAM_CENTROIDS: usize = 1024;
/// Rows of a thread block's tile in `assign_sm80.cu`, and its threads.
pub const SM80_ROWS: usize = 128;
/// Centroids of a thread block's tile in `assign_sm80.cu`.
pub const SM80_CENTROIDS: usize = 64;
/// Columns of a stage in `assign_sm80.cu`.
pub const SM80_COLUMNS: usize = 32;
/// Stages of its ring.
pub const SM80_STAGES: usize = 4;
/// Candidates that one thread block of `recheck.cu` queues.
pub const RECHECK_QUEUE: usize = 1024;
/// Shared memory of each of its rows and of each candidate, in bytes.
pub const RECHECK_BYTES: usize = 12;
/// Rows of a searching warpgroup in `assign_sm90.cu`: what one product takes.
pub const SM90_ROWS: usize = 64;
/// Centroids of a tile in `assign_sm90.cu`.
pub const SM90_CENTROIDS: usize = 128;
/// Shared memory of a thread block of `assign_sm90.cu`, in bytes: all that Hopper gives one.
pub const SM90_SHARED: usize = 232_448;
/// Rows of a thread block of `assign_wide_sm90.cu`: two searching warpgroups.
pub const WIDE_ROWS: usize = 128;
/// Blocks of a cluster of it, which bring each other centroids: a tile has as many of `assign_sm90.cu`'s.
pub const WIDE_CLUSTER: usize = 2;
/// Threads of its block.
pub const WIDE_THREADS: usize = 384;
/// Centroids that tensor-core kernels take `start` and `scale` of are padded to whole tiles of any of them.
pub const TENSOR_CENTROIDS: usize = 128;
/// Rows that one wave of blocks of `assign_sm90.cu` takes on 132 multiprocessors.
pub const SPLIT_WAVE: usize = 25_344;
/// Bytes that whole waves of f32 rows, split into halves, should not take more than.
pub const SPLIT_BYTES: usize = 134_217_728;
/// Rows that one thread of `sort.cu` takes at a time.
pub const SORT_ITEMS: usize = 16;
/// Threads of a block that counts rows, and of one that sorts them in tiles if there are few.
pub const SORT_THREADS: usize = 512;
/// Threads of a block that sorts rows in tiles if there are many rows, and most of one that sorts a whole problem.
pub const SORT_WHOLE: usize = 1024;
/// Rows that a thread takes at a time of a block that sorts many rows in tiles.
pub const SORT_ITEMS_MANY: usize = 32;
/// So many problems or tiles are many: enough to fill any device.
pub const SORT_MANY: usize = 192;
/// Most warps of a block that places rows in ascending order; fewer when there are many clusters, since each has counters of its own.
pub const SORT_WARPS: usize = 16;
/// Most counters of a warp. More clusters than that are sorted digit by digit.
pub const SORT_BINS: usize = 8192;
/// Chunks that a sort cuts its rows into, if they are as long as what a block ranks at a time, at least.
pub const SORT_CHUNKS: usize = 1024;
/// Most sorted rows that one warp of `update.cu` sums.
pub const SUM_ROWS: usize = 1024;
/// Fewest of them.
pub const SUM_ROWS_LEAST: usize = 32;
/// Pieces are made as long as the average cluster, up to so many rows, if enough of them are left to fill any device.
pub const SUM_CLUSTER: usize = 256;
/// Pieces that `update.cu` makes longer than that rather than make more of them.
pub const SUM_WARPS: usize = 16_384;
/// Pieces that are enough to fill any device: with fewer, they are shorter than a cluster.
pub const SUM_WARPS_LEAST: usize = 4096;
/// Threads of a block of `update.cu`.
pub const SUM_THREADS: usize = 64;
/// Such blocks that a multiprocessor should hold if they sum f16.
pub const SUM_BLOCKS: usize = 11;
/// If they sum other types.
pub const SUM_BLOCKS_LIMBS: usize = 10;
/// If they sum products.
pub const SUM_BLOCKS_WEIGHTED: usize = 8;
/// Rows of a chunk of which a block finds those that have changed their cluster.
pub const CHANGES_ROWS: usize = 4096;
/// Rows that a cluster has gained or lost of which a warp takes a slice: as many, or more if a problem would have more slices than
pub const CHANGES_SLICE: usize = 64;
/// these, beside one for each cluster; but no more than so many.
pub const CHANGES_SLICES: usize = 8192;
pub const CHANGES_SLICE_MOST: usize = 8192;
/// Blocks of a multiprocessor that add up and finish changes.
pub const CHANGES_BLOCKS: usize = 3;
/// Blocks that finish the changes of a problem.
pub const CHANGES_SHARES: usize = 8;
/// An update on a GPU adds only these where they are at most one of so many.
pub const CHANGES_FEW: usize = 4;
/// The rows that are read in the time in which the sums of a cluster are changed and divided.
pub const CHANGES_CLUSTER: usize = 8;
/// Threads of a block that adds up clusters with terms beyond the scale of their problem.
pub const LEFT_THREADS: usize = 512;
/// Columns of it, of which the last one is the weight.
pub const LEFT_COLUMNS: usize = 4;
/// Such blocks: enough to fill any device, and cheap when there are no such clusters.
pub const LEFT_BLOCKS: usize = 264;
/// Columns of a thread block in the median kernel.
pub const MEDIAN_COLUMNS: usize = 32;
/// Centroids that the common shift of `prepare.cu` is the mean of: it only has to be near the data, and always the same.
pub const MEAN_SAMPLES: usize = 256;
/// Columns of which one block finds the origin: two to a lane.
pub const ORIGIN_COLUMNS: usize = 64;
/// Lanes that move a centroid.
pub const MOVE_LANES: usize = 8;
/// Threads of a block that finds the origin of the centroids, or prepares all of a problem's.
pub const ORIGIN_THREADS: usize = 512;
/// Most centroids of a problem that one block prepares.
pub const PREPARE_CENTROIDS: usize = 512;
/// Centroids of a group that an assignment on a GPU scores or skips together.
pub const SKIP_GROUP: usize = 64;
/// Threads of a block of `halve.cu`.
pub const HALVE_THREADS: usize = 512;
/// Centroids of a node that its direction is found by, at most.
pub const HALVE_SAMPLES: usize = 512;
/// Centroids that such a block projects, at least, where several share a node.
pub const HALVE_ROWS: usize = 128;
/// Most threads of a block of the scan in `sort.cu`: a warp for each few chunks.
pub const SCAN_THREADS: usize = 1024;
/// Steps of a batch of rows of `update.cu`.
pub const SUM_STEPS: usize = 4;
/// Batches of the ring through which a warp of it reads its rows.
pub const SUM_BATCHES: usize = 2;
/// Threads of a block of `attend.cu`.
pub const ATTEND_THREADS: usize = 384;
/// The same for rows of more than 128 columns, of which a thread has twice as much in registers.
pub const ATTEND_THREADS_WIDE: usize = 256;
/// Most blocks that share what the query heads of a key head read: clusters of so many can run on any GPU that has them.
pub const ATTEND_BLOCKS: usize = 8;
/// Query heads that one pass of it takes.
pub const ATTEND_HEADS: usize = 8;
/// Clusters from which on blocks rank them together.
pub const ATTEND_TEAM: usize = 4_000;
/// Bytes of mean values of a block that it asks for before it reads mean keys.
pub const ATTEND_PREFETCHED: usize = 65_536;
/// Gains of product codes to an octave: code `i` is one of `2^(-i / 16)`.
pub const GAINS_PER_OCTAVE: usize = 16;
/// Threads of a block of `select.cu`, which ranks the clusters of a unit.
pub const SELECT_THREADS: usize = 1024;
/// The same where units are many, so that blocks share a multiprocessor.
pub const SELECT_THREADS_MANY: usize = 256;
/// So many are many.
pub const SELECT_MANY: usize = 1024;
/// Threads of a block of `route.cu`, each warp of which takes 16 queries or 32.
pub const ROUTE_THREADS: usize = 128;
/// Keys of a tile there.
pub const ROUTE_KEYS: usize = 64;
/// Rows that `lut.cu` multiplies at most; more are multiplied with weights that it decodes.
pub const LUT_ROWS: usize = 128;
/// Rows and products of the two and a weight from which `lut_sm90.cu` takes less time, both its launches included.
pub const LUT_SM90_LEAST: usize = 17;
pub const LUT_SM90_WORTH: usize = 134_217_728;
/// Rows that it takes at a time, which have room in the order of codes.
pub const LUT_SM90_ROWS: usize = 8192;
/// Outputs of a thread block of it: two warpgroups.
pub const LUT_SM90_OUTPUTS: usize = 128;
/// Blocks of columns whose values, and codes, have a place there at a time.
pub const LUT_SM90_STAGES: usize = 8;
/// Thread blocks that share a tile, at most.
pub const LUT_SM90_PARTS: usize = 8;
/// Outputs of a thread block of it: the tall side of a product of tensor cores.
pub const LUT_TALL: usize = 16;
/// Blocks of columns whose codes a warp of it loads ahead, where its products have eight columns, of rows of f16; of others half as many.
pub const LUT_STEPS: usize = 8;
/// Columns of a product, in tiles of eight, at most.
pub const LUT_WIDE: usize = 4;
/// Thread blocks of it on a multiprocessor.
pub const LUT_BLOCKS: usize = 2;
/// Threads of a block of every other kernel.
pub const THREADS: usize = 256;
/// Cells that one block walks in a pass over a matrix, and keys or labels in a pass over a list.
pub const PASS: usize = 16384;
/// Rows of a thread block's tile in `pairwise.cu`.
pub const PAIR_ROWS: usize = 128;
/// Centroids of it.
pub const PAIR_CENTROIDS: usize = 64;
/// Columns of both that it multiplies at a time.
pub const PAIR_COLUMNS: usize = 32;
/// Shared memory for these and the next ones, as f64 and with four columns more.
pub const PAIR_SHARED: usize = 110_592;
/// Most nearest centroids that are asked for: two to a lane of `nearest.cu`.
pub const NEAREST: usize = 64;
/// Rows that a block of k-means++ draws, of a warp's lanes at most one each.
pub const KMEANSPP_DRAWS: usize = 16;
/// Candidates of a block of greedy k-means++ at most: a bit of a word each.
pub const CANDIDATES: usize = 64;
/// A block of greedy k-means++ ends with a seed that more than one of so many rows have come nearer to: the lists of others are then mostly
/// out of date.
pub const DENSE_LISTS: usize = 16;
/// Threads of a block that chooses among rows that greedy k-means++ tries.
pub const CHOICE_THREADS: usize = 512;
/// Threads of a block whose rows meet seeds, and its rows at least.
pub const SEED_THREADS: usize = 128;
pub const SEED_ROWS: usize = 32;
/// Rows of a block that lists those nearer to candidates of greedy k-means++ at least.
pub const LIST_ROWS: usize = 128;
/// Threads of a block that meets seeds by products, and its rows, which are whole times this: of each of its warps a tile.
pub const SEED_FILTER_THREADS: usize = 256;
pub const SEED_FILTER_ROWS: usize = 128;
/// Rows of a block of a race, of which each thread has some.
pub const RACE_ROWS: usize = 2048;
/// Most blocks whose warps let the rows of a problem meet seeds.
pub const PICK_PARTS: usize = 4096;
/// Blocks that share the rows left to recheck: enough to fill any device, and cheap when there are none.
pub const RECHECK_BLOCKS: usize = 1024;
