// A whole fit of rows of one column in one launch: sorted once, a cluster is a range of them, and its sum the
// difference of two prefix sums. An iteration takes k log n steps instead of k n, and the results have the bits of any
// other fit (src/cpu/sorted_1d.rs does the same).
//
// A block takes a few problems. It sorts the rows of one after another by radix (CUB) and keeps them with their prefix
// sums on chip; then a warp iterates for each. Between two neighbouring centroids the rows change sides where the
// definition of a distance says so, which a binary search finds. A problem goes on a list for `fit_narrow` if it has a
// value or a centroid that is no number, sums that 64 bits do not hold, or neighbouring centroids so near each other
// that their distances to a far value may round to the same.
// Traffic: X once, labels once, and the centroids twice.
#include <cub/block/block_radix_sort.cuh>
#include <cub/block/block_scan.cuh>

#include "exact/sums.cuh"

/// The keys of a type: integers in the order of its numbers.
template <class T>
struct Keys {
    using Bits = uint16_t;
};
template <>
struct Keys<float> {
    using Bits = uint32_t;
};

/// The sorted rows of a problem.
template <int CAPACITY>
struct alignas(16) Sorted {
    union {
        long long sums[CAPACITY];  // of the values before each place
        uint16_t labels[CAPACITY];
    };
    long long all;            // the sum of all values
    float values[CAPACITY];   // ascending
    uint16_t rows[CAPACITY];  // where each comes from
    int unit;                 // sums are in units of 2^unit
    uint32_t clusters;        // centroids that have no equal before them
    bool left;                // whether the problem is for `fit_narrow`
};

/// A block of THREADS, each of which sorts ITEMS rows.
template <class T, int THREADS_, int ITEMS>
struct Sorter {
    static constexpr int CAPACITY = THREADS_ * ITEMS;
    using Bits = typename Keys<T>::Bits;
    using Sort = cub::BlockRadixSort<Bits, THREADS_, ITEMS, uint16_t>;
    using Scan = cub::BlockScan<long long, THREADS_>;

    union Shared {
        typename Sort::TempStorage sort;
        typename Scan::TempStorage scan;
        struct {
            int lowest, highest;  // no value has a bit below 2^lowest, or from 2^highest on
        };
    };

    __device__ static int exponent_of(uint32_t bits) { return max(int(bits >> 23 & 0xff), 1) - 150; }

    static_assert(sizeof(Shared) <= sizeof(Sorted<CAPACITY>::sums), "rows are sorted where their sums will be");

    /// Sorts the rows of a problem and adds them up.
    __device__ static void load(Sorted<CAPACITY>& to, const T* x, int64_t row_stride, int n) {
        Shared& s = reinterpret_cast<Shared&>(to.sums);
        Bits keys[ITEMS];
        uint16_t rows[ITEMS];
        if (threadIdx.x == 0) s.lowest = INT32_MAX, s.highest = INT32_MIN;
        __syncthreads();
        int lowest = INT32_MAX, highest = INT32_MIN;
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) {
            const int row = i * THREADS_ + threadIdx.x;
            rows[i] = row, keys[i] = Bits(~Bits(0));
            if (row >= n) continue;
            const T value = x[row * row_stride];
            keys[i] = ordered(reinterpret_cast<const Bits&>(value));
            const uint32_t bits = __float_as_uint(filter(value)), fraction = bits & 0x7fffff;
            const uint32_t mantissa = bits >> 23 & 0xff ? fraction | 0x800000 : fraction;
            if (!mantissa) continue;
            lowest = min(lowest, exponent_of(bits) + __ffs(mantissa) - 1);
            highest = max(highest, exponent_of(bits) + 24);
        }
        lowest = __reduce_min_sync(~0u, lowest), highest = __reduce_max_sync(~0u, highest);
        if (threadIdx.x % WARP == 0) atomicMin(&s.lowest, lowest), atomicMax(&s.highest, highest);
        __syncthreads();
        lowest = s.lowest, highest = s.highest;
        // Zeros have no bits at all. So many terms are no more than this many times the largest.
        if (lowest == INT32_MAX) lowest = highest = 0;
        const bool fits = highest - lowest + 32 - __clz(n) <= 62;
        __syncthreads();
        Sort(s.sort).Sort(keys, rows);
        long long terms[ITEMS], all;
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) {
            const int place = threadIdx.x * ITEMS + i;
            const Bits bits = unordered(keys[i]);
            const float value = filter(reinterpret_cast<const T&>(bits));
            // In two steps, since a power of two that is no f64 may be wanted.
            const int half = lowest / 2;
            const double units = double(value) * power_of_two(-half) * power_of_two(half - lowest);
            terms[i] = place < n && fits ? __double2ll_rn(units) : 0;
            to.values[place] = value, to.rows[place] = rows[i];
        }
        __syncthreads();
        Scan(s.scan).ExclusiveSum(terms, terms, all);
        __syncthreads();
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) to.sums[threadIdx.x * ITEMS + i] = terms[i];
        if (threadIdx.x == 0) to.all = all, to.unit = lowest, to.left = !fits;
        __syncthreads();
    }
};

/// A warp at a problem.
template <class T, int CAPACITY>
struct Line {
    Sorted<CAPACITY>& s;
    double* centroids;  // (k)
    uint32_t* sorted;   // (k): the different ones, ascending
    uint32_t* ends;     // (k): where their rows end
    const int n, k, lane;

    __device__ long long sum_before(uint32_t place) const { return place < n ? s.sums[place] : s.all; }

    /// True if the centroids, which are all different, are still in the order of the last iteration.
    __device__ bool in_order() const {
        bool rises = s.clusters == k;
        for (int i = lane; i + 1 < k && rises; i += WARP) rises = centroids[sorted[i]] < centroids[sorted[i + 1]];
        return __all_sync(~0u, rises);
    }

    /// Sorts the different centroids by counting those below each. Says so if one is no number.
    __device__ bool sort_centroids() const {
        bool numbers = true;
        uint32_t firsts = 0;
        for (int j = lane; j < k; j += WARP) {
            const double own = centroids[j];
            uint32_t less = 0;
            bool first = true;
            for (int i = 0; i < k; ++i) {
                const double other = centroids[i];
                less += other < own, first &= !(other == own && i < j);
            }
            numbers &= bool(isfinite(own));
            // Places of centroids that repeat an earlier one stay free.
            sorted[j] = UINT32_MAX, ends[j] = first ? less : UINT32_MAX, firsts += first;
        }
        if (!__all_sync(~0u, numbers)) return false;
        firsts = __reduce_add_sync(~0u, firsts);
        __syncwarp();
        for (int j = lane; j < k; j += WARP) {
            if (ends[j] != UINT32_MAX) sorted[ends[j]] = j;
        }
        __syncwarp();
        if (lane == 0) {
            s.clusters = firsts;
            for (int j = 0, to = 0; firsts < k && j < k; ++j) {
                const uint32_t index = sorted[j];
                if (index != UINT32_MAX) sorted[to++] = index;
            }
        }
        __syncwarp();
        return true;
    }

    /// Finds the rows of each centroid; false where this is not for them.
    __device__ bool assign(bool known_order) const {
        if (!(known_order && in_order()) && !sort_centroids()) return false;
        const float reach = fmaxf(fabsf(s.values[0]), fabsf(s.values[n - 1]));
        bool apart = true, falls = false;
        for (uint32_t i = lane; i < s.clusters; i += WARP) {
            ends[i] = n;
            if (i + 1 == s.clusters) continue;
            const uint32_t j = sorted[i], other = sorted[i + 1];
            const double here = centroids[j], there = centroids[other];
            apart &= there - here > (reach + fmax(fabs(here), fabs(there))) * 0x1p-48;
            const auto stays = [&](uint32_t place) {
                const double v = s.values[place], u = squared(v, here), w = squared(v, there);
                return u < w || (u == w && j < other);
            };
            // The middle says where, but for rounding.
            const float middle = float((here + there) / 2);
            uint32_t end = partition_point(n, [&](uint32_t place) { return s.values[place] < middle; });
            if ((end > 0 && !stays(end - 1)) || (end < n && stays(end))) end = partition_point(n, stays);
            ends[i] = end;
        }
        __syncwarp();
        for (uint32_t i = lane; i + 1 < s.clusters; i += WARP) falls |= ends[i] > ends[i + 1];
        if (__any_sync(~0u, falls) && lane == 0) {
            for (uint32_t i = 1; i < s.clusters; ++i) ends[i] = max(ends[i], ends[i - 1]);
        }
        __syncwarp();
        return __all_sync(~0u, apart);
    }

    template <class Stays>
    __device__ static uint32_t partition_point(uint32_t end, Stays stays) {
        uint32_t begin = 0;
        while (begin < end) {
            const uint32_t middle = (begin + end) / 2;
            if (stays(middle)) begin = middle + 1;
            else end = middle;
        }
        return begin;
    }

    /// Replaces the centroids that have rows; returns the largest squared shift.
    __device__ double update() const {
        double most = 0;
        for (uint32_t i = lane; i < s.clusters; i += WARP) {
            const uint32_t begin = i ? ends[i - 1] : 0, end = ends[i];
            if (begin == end) continue;
            const long long sum = sum_before(end) - sum_before(begin);
            const Scaled total = scaled(0, sum < 0 ? -sum : sum, s.unit, sum < 0);
            double& centroid = centroids[sorted[i]];
            const double mean = wide(rounded<T>(total.over(scaled(double(end - begin)))));
            const double moved = squared(mean, centroid);
            most = moved == moved ? fmax(most, moved) : INFINITY;
            centroid = mean;
        }
        for (int lanes = WARP / 2; lanes; lanes /= 2) most = fmax(most, __shfl_xor_sync(~0u, most, lanes));
        __syncwarp();
        return most;
    }

    /// All iterations: the one in which the problem converged, or -1; `left` says if it is for another kernel.
    __device__ int64_t iterate(int64_t max_iters, double threshold) const {
        bool done = false;
        for (int64_t iteration = 0;; ++iteration) {
            if (!assign(iteration > 0)) {
                if (lane == 0) s.left = true;
                return -1;
            }
            if (done) return iteration;
            if (iteration == max_iters) return -1;
            done = update() <= threshold;
        }
    }

    /// Labels the rows, on chip.
    __device__ void label() const {
        for (int place = lane; place < n; place += WARP) {
            const uint32_t at = partition_point(s.clusters, [&](uint32_t i) { return ends[i] <= place; });
            s.labels[s.rows[place]] = sorted[at];
        }
        __syncwarp();
    }
};

template <class T, int THREADS_, int ITEMS, int PROBLEMS>
__device__ __forceinline__ void fit(const T* x, const Rows& r, const Summands& summands, int64_t max_iters,
                                    const double* threshold, uint32_t* stop, int64_t k, T* all_centroids,
                                    uint32_t* labels, uint32_t* left) {
    using Sort = Sorter<T, THREADS_, ITEMS>;
    using Problem = Sorted<Sort::CAPACITY>;
    static_assert(PROBLEMS * WARP <= THREADS_ && sizeof(Problem) <= Sort::CAPACITY * LINE_BYTES + LINE_FIXED,
                  "a warp to each, and their plan");
    extern __shared__ __align__(16) uint8_t raw[];
    Problem* const problems = reinterpret_cast<Problem*>(raw);
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, n = r.n;
    double* const centroids = reinterpret_cast<double*>(problems + PROBLEMS);
    uint32_t* const places = reinterpret_cast<uint32_t*>(centroids + PROBLEMS * k);
    for (int64_t first = int64_t(blockIdx.x) * PROBLEMS; first < r.b; first += int64_t(gridDim.x) * PROBLEMS) {
        const int count = min(int64_t(PROBLEMS), r.b - first);
        for (int i = 0; i < count; ++i) {
            Sort::load(problems[i], x + (first + i) * r.batch_stride, r.row_stride, n);
        }
        if (warp < count) {
            const int64_t b = first + warp;
            T* const stored = all_centroids + b * k;
            const Line<T, Sort::CAPACITY> line = {problems[warp],
                                                  centroids + warp * k,
                                                  places + 2 * warp * k,
                                                  places + (2 * warp + 1) * k,
                                                  n,
                                                  int(k),
                                                  lane};
            for (int j = lane; j < k; j += WARP) line.centroids[j] = wide(stored[j]);
            if (lane == 0) line.s.left |= summands.first_nonfinite[b] != UINT32_MAX;
            __syncwarp();
            const int64_t stopped = line.s.left ? -1 : line.iterate(max_iters, threshold[b]);
            __syncwarp();
            if (line.s.left) {
                if (lane == 0) left[1 + atomicAdd(&left[0], 1)] = b;
            } else {
                if (stopped >= 0 && lane == 0) stop[b] = stopped;
                for (int j = lane; j < k; j += WARP) stored[j] = rounded<T>(line.centroids[j]);
                line.label();
                for (int row = lane; row < n; row += WARP) labels[b * n + row] = line.s.labels[row];
            }
        }
        __syncthreads();
    }
}

#define KERNEL(name, T, ROWS, THREADS_, ITEMS, PROBLEMS)                                                               \
    extern "C" __global__ void __launch_bounds__(THREADS_, LINE_THREADS / THREADS_)                                    \
        fit_line_##ROWS##_##name(const T* x, Rows r, Summands summands, int64_t max_iters, const double* threshold,    \
                                 uint32_t* stop, int64_t k, T* centroids, uint32_t* labels, uint32_t* left) {          \
        static_assert(ROWS == THREADS_ * ITEMS, "its name");                                                           \
        fit<T, THREADS_, ITEMS, PROBLEMS>(x, r, summands, max_iters, threshold, stop, k, centroids, labels, left);     \
    }
#define INSTANCE(name, T)                                                                                              \
    KERNEL(name, T, 512, 64, 8, 2)                                                                                     \
    KERNEL(name, T, 1024, 128, 8, 4)                                                                                   \
    KERNEL(name, T, 2048, 256, 8, 4) KERNEL(name, T, 4096, 512, 8, 2) KERNEL(name, T, 8192, 512, 16, 1)
INSTANCE(f16, __half)
INSTANCE(bf16, __nv_bfloat16)
INSTANCE(f32, float)
#undef INSTANCE
#undef KERNEL
