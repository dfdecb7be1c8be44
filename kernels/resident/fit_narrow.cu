// A whole fit of rows of at most 8 columns in one launch, for problems that fit in shared memory.
//
// A block takes a problem and keeps its rows, labels and sums on chip for all iterations: centroids are prepared and
// rows labelled as in assign_narrow.cu, rows are brought into cluster order by a counting sort, and a thread adds up a
// column of a cluster. Sums are integers (src/fixed.rs), so atomics may finish them in any order, and once they are
// known, only rows that have changed their cluster move from one sum to another (as in update/changes.cu), unless more
// than half of the rows have. With a term that is no such integer, or a row that is not finite, sums are added up once
// more, by warps, and are not known afterwards. A block that has converged goes on to the next problem. Traffic: X
// once, labels once, and the centroids, which stay in the cache.
#include "assign/narrow_tensor.cuh"
#include "resident/narrow_sums.cuh"

/// The sum of D terms in the order of `striped` in src/fixed.rs.
template <int D>
__device__ __forceinline__ double striped_here(double (&terms)[D]) {
#pragma unroll
    for (int step = D / 2; step; step /= 2) {
#pragma unroll
        for (int i = 0; i < step; ++i) terms[i] = __dadd_rn(terms[i], terms[i + step]);
    }
    return terms[0];
}

/// Adds up clusters once more, a column to a warp: to `remainders` and `weights`, as `Scaled`.
template <class T, int D>
__device__ __forceinline__ void add_exactly(const OnChip<T, D>& s, uint32_t k, bool dirty, const double* factor) {
    const uint32_t lane = threadIdx.x % WARP;
    for (uint32_t item = threadIdx.x / WARP; item < k * (D + 1); item += blockDim.x / WARP) {
        const uint32_t j = item / (D + 1), q = item % (D + 1), end = s.starts[j + 1];
        Gathered sum;
#pragma unroll 1
        for (uint32_t next = s.starts[j]; next < end; next += WARP) {
            double term = 0;
            if (next + lane < end) {
                const uint32_t row = s.order[next + lane];
                const double f = factor ? factor[row] : 1;
                const T* const values = s.x + row * D;
                if (!dirty || finite(values, D)) term = q < D ? __dmul_rn(wide(values[q]), f) : f;
            }
            sum.add(term);
        }
        const Scaled rounded = sum.all().rounded();
        if (lane == 0) *reinterpret_cast<Scaled*>(q < D ? &s.remainders[j * D + q] : &s.weights[j]) = rounded;
    }
}

/// Replaces the centroids as `replace` does, from sums of any terms. Not inlined, so that it takes no registers from
/// where it is not needed.
template <class T, int D>
__device__ __noinline__ void replace_exactly(OnChip<T, D> s, T* c, uint32_t k, int d, bool dirty, const double* factor,
                                             int divisor, double* shift) {
    add_exactly(s, k, dirty, factor);
    __syncthreads();
#pragma unroll 1
    for (uint32_t j = threadIdx.x; j < k; j += blockDim.x) {
        const Scaled* const sums = reinterpret_cast<const Scaled*>(s.remainders + j * D);
        double terms[D];
        const Quotient by(
            divisor, *reinterpret_cast<const Scaled*>(s.weights + j),
            [&](int64_t shift) {
#pragma unroll
                for (int q = 0; q < D; ++q) {
                    const double t = sums[q].value(shift);
                    terms[q] = __dmul_rn(t, t);
                }
                return striped_here(terms);
            },
            [&] {
                int64_t most = INT32_MIN;
#pragma unroll 1
                for (int q = 0; q < D; ++q) {
                    if (sums[q].significand != 0) most = max(most, sums[q].exponent);
                }
                return most == INT32_MIN ? 0 : most;
            });
        if (!by.some()) continue;
#pragma unroll
        for (int q = 0; q < D; ++q) {
            terms[q] = 0;
            if (q >= d) continue;
            const T mean = rounded<T>(by.divide(sums[q]));
            terms[q] = squared(wide(mean), wide(c[j * d + q]));
            c[j * d + q] = mean;
        }
        const double moved = striped_here(terms);
        if (!(moved == 0)) atomic_max(shift, moved == moved ? moved : INFINITY);
    }
}

/// The sum of the terms of D neighbouring lanes in the order of `striped_here`, in all of them.
template <int D>
__device__ __forceinline__ double striped_lanes(double term) {
#pragma unroll
    for (int step = D / 2; step; step /= 2) term = __dadd_rn(term, __shfl_xor_sync(~0u, term, step));
    return term;
}

/// Replaces the centroids `c` (k, d) but those of no weight, a thread to a column; returns the largest squared shift.
/// Sets `odd` if there is one that squares of f64 cannot measure.
template <class T, int D>
__device__ double replace(const OnChip<T, D>& s, T* c, uint32_t k, int d, const Units<T>& units, bool weighted,
                          int weight_scale, int divisor, bool& odd) {
    double most = 0;
    const uint32_t lane = threadIdx.x % WARP, q = lane % D;
#pragma unroll 1
    for (uint32_t first = threadIdx.x - lane; first < k * D; first += blockDim.x) {
        const uint32_t i = min(first + lane, (k - 1) * D + q), j = i / D;
        __int128 sum = s.remainders[i];
#pragma unroll
        for (int l = 0; l < 2; ++l) {
            sum += __int128((long long)s.limbs[l * k * D + i]) << (units.unit(l) + units.scale);
        }
        const double total = fixed_value(sum, units.scale);
        double by = 0;
        if (divisor == NORM) {
            const double squares = striped_lanes<D>(__dmul_rn(total, total));
            const bool any_sum = __ballot_sync(~0u, total != 0) >> (lane - q) & (1u << D) - 1;
            if (any_sum && !(LEAST_SQUARES <= squares && squares <= MOST_SQUARES)) odd = true;
            else by = __dsqrt_rn(squares);
        } else {
            by = weighted ? fixed_value(s.weights[j], weight_scale) : double(s.sizes[j]);
        }
        double term = 0;
        if (first + lane < k * D && by > 0 && q < d) {
            const T mean = rounded<T>(__ddiv_rn(total, by));
            term = squared(wide(mean), wide(c[j * d + q]));
            c[j * d + q] = mean;
        }
        const double moved = striped_lanes<D>(term);
        most = moved == moved ? fmax(most, moved) : INFINITY;
    }
    return most;
}

template <class T, int D>
__device__ void fit(const T* x, const Rows& r, const Active& active, const Summands& summands, int metric, int divisor,
                    int64_t max_iters, const double* threshold, int64_t fragment_bytes, int64_t narrow_bytes,
                    uint32_t* stop, int64_t k, T* centroids, uint32_t* labels) {
    extern __shared__ __align__(16) uint8_t raw[];
    __shared__ double shift;
    __shared__ bool odd;
    __shared__ uint32_t changed;
    constexpr bool TENSOR = scored_by_halves<T, D>;
    const Narrow<Filter<T>, D> to(raw + fragment_bytes, k);
    const Fragments<D> fragments(raw, to.padded);
    const OnChip<T, D> s(raw + narrow_bytes, r.n, k);
    const ChangedLabels changes(s, r.n, &changed);
    const Rows here = {0, D, 1, r.n, r.d};
    const int d = int(r.d);
    for (uint32_t at = blockIdx.x; at < active.problems(r.b); at += gridDim.x) {
        const uint32_t b = active.problem(at);
        T* const c = centroids + b * k * d;
        const double* const factor = summands.row_scale ? summands.row_scale + b * r.n : nullptr;
        const Units<T> units(summands.max_abs[b], summands.max_weight ? summands.max_weight[b] : 1, r.n,
                             summands.first_nonfinite[b] != UINT32_MAX);
        const int weight_scale = summands.max_weight ? fixed_scale(summands.max_weight[b], r.n) : 0;
        for (int64_t i = threadIdx.x; i < r.n * D; i += blockDim.x) {
            s.x[i] = i % D < d ? row_of(x, r, b, i / D)[i % D] : T(0.0f);
        }
        // `known` says that the sums are those of the labels before.
        bool done = false, tensor = TENSOR && fragment_bytes, known = false;
        for (int64_t iteration = 0;; ++iteration) {
            __syncthreads();
            if (threadIdx.x == 0) changed = 0;
            // Centroids move less and less, and mu only has to be near them.
            to.prepare(c, d, d, metric, (iteration & (iteration - 1)) == 0);
            if (threadIdx.x == 0) shift = 0, odd = false;
            if (tensor) {
                if constexpr (TENSOR) {
                    fragments.prepare(to);
                    tensor = most_proven(
                        assign_rows_tensor<true, T, D>(s.x, here, 0, 0, r.n, c, d, to, fragments, changes), r.n);
                }
            } else {
                assign_rows<T, D, false>(s.x, here, 0, 0, r.n, c, d, to, metric, changes);
                __syncthreads();
            }
            if (done && threadIdx.x == 0) stop[b] = iteration;
            if (done || iteration == max_iters) break;
            const bool few = known && changed <= changes.room;
            if (few) {
                add_changes(s, changes, k, units, factor, weight_scale, divisor);
            } else {
                sort(s, r.n, k);
                add(s, k, units, factor, weight_scale, divisor, odd);
            }
            // (What a warp finds another one may be about to set.)
            const double moved = warp_max(
                __any_sync(~0u, odd) ? 0 : replace(s, c, k, d, units, factor != nullptr, weight_scale, divisor, odd));
            if (threadIdx.x % WARP == 0 && moved > 0) atomic_max(&shift, moved);
            __syncthreads();
            known = !odd;
            if (!known) {
                if (few) sort(s, r.n, k);
                replace_exactly(s, c, k, d, units.dirty, factor, divisor, &shift);
                __syncthreads();
            }
            done = shift <= threshold[b];
        }
        for (int64_t i = threadIdx.x; i < r.n; i += blockDim.x) labels[b * r.n + i] = s.labels[i];
        __syncthreads();
    }
}

#define KERNEL(name, T, D)                                                                                             \
    extern "C" __global__ void __launch_bounds__(D > 4   ? FIT_THREADS_8                                               \
                                                 : D > 2 ? FIT_THREADS_4                                               \
                                                         : FIT_THREADS_2,                                              \
                                                 D > 2 || sizeof(T) == 8 ? 1 : 2)                                      \
        fit_narrow_##D##_##name(const T* x, Rows r, Active active, Summands summands, int metric, int divisor,         \
                                int64_t max_iters, const double* threshold, int64_t fragment_bytes,                    \
                                int64_t narrow_bytes, uint32_t* stop, int64_t k, T* centroids, uint32_t* labels) {     \
        fit<T, D>(x, r, active, summands, metric, divisor, max_iters, threshold, fragment_bytes, narrow_bytes, stop,   \
                  k, centroids, labels);                                                                               \
    }
#define INSTANCE(name, T) KERNEL(name, T, 1) KERNEL(name, T, 2) KERNEL(name, T, 4) KERNEL(name, T, 8)
FOR_EACH_TYPE(INSTANCE)
#undef INSTANCE
#undef KERNEL
