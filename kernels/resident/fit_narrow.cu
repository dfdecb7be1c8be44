// A whole fit of rows of at most 8 columns in one launch, for problems that fit in shared memory.
//
// A block takes a problem and keeps its rows, labels and sums on chip for all iterations: centroids are prepared and
// rows labelled as in assign_narrow.cu, rows are brought into cluster order by a counting sort, and a thread adds up a
// column of a cluster. Sums are integers (src/fixed.rs), so atomics may finish them in any
// order. With a term that is no such integer, or a row that is not finite, they are added up once more, by warps. A
// block that has converged goes on to the next problem. Traffic: X once, labels once, and the centroids, which stay in
// the cache.
#include "assign/narrow_tensor.cuh"
#include "exact/sums.cuh"
#include "scan.cuh"

/// A problem's part of shared memory, behind its centroids (`FitNarrow` in src/plan/on_chip.rs).
template <class T, int D>
struct OnChip {
    __int128* remainders;       // (k, D): what limbs could not take
    __int128* weights;          // (k)
    unsigned long long* limbs;  // (2, k, D), two's complement
    uint32_t *starts, *sizes;   // (k + 1) and (k): where clusters begin, and how many rows they have
    T* x;                       // (n, D), zeros beyond the columns
    uint16_t *labels, *order;   // (n): the rows by cluster, or those that have changed theirs and which it was

    __device__ OnChip(uint8_t* raw, int64_t n, int64_t k) {
        remainders = reinterpret_cast<__int128*>(raw);
        weights = remainders + k * D;
        limbs = reinterpret_cast<unsigned long long*>(weights + k);
        x = reinterpret_cast<T*>(limbs + 2 * k * D);
        starts = reinterpret_cast<uint32_t*>(x + (n * D + 7) / 8 * 8);
        sizes = starts + k + 1;
        labels = reinterpret_cast<uint16_t*>(sizes + k);
        order = labels + n;
    }
};

/// Labels of rows on chip, which list the rows that they change: so many at most, and counts the others too.
struct ChangedLabels {
    uint16_t *labels, *rows, *former;  // (n), and of the changes the rows and the labels that they had
    uint32_t *count, room;

    template <class T, int D>
    __device__ ChangedLabels(const OnChip<T, D>& s, uint32_t n, uint32_t* count)
        : labels(s.labels),
          rows(s.order),
          former(s.order + n / 2),
          count(count),
          room(n / 2) {}

    __device__ __forceinline__ void put(bool live, int64_t row, int index) const {
        const uint32_t before = live ? labels[row] : index;
        const uint32_t changed = __ballot_sync(~0u, before != index);
        if (!changed) return;
        const int lane = threadIdx.x % WARP, first = __ffs(changed) - 1;
        uint32_t place = 0;
        if (lane == first) place = atomicAdd(count, __popc(changed));
        place = __shfl_sync(~0u, place, first) + __popc(changed & (1u << lane) - 1);
        if (before == index) return;
        labels[row] = index;
        if (place < room) rows[place] = row, former[place] = before;
    }
};

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

/// Sorts the rows by label, and clears what is added to where limbs cannot take all.
template <class T, int D>
__device__ void sort(const OnChip<T, D>& s, uint32_t n, uint32_t k) {
    for (uint32_t i = threadIdx.x; i < k * D; i += blockDim.x) s.remainders[i] = 0;
    block_counting_sort<uint32_t>(n, k, blockDim.x, s.labels, [](uint32_t) { return true; }, s.starts, s.sizes, s.order);
}

/// Rows of a cluster that one thread adds up for a column, and a warp at a time of those beyond: no more than a limb
/// has room for, which is 2^10.
constexpr uint32_t OWN_ROWS = 64;

/// The sum of a column over rows of a cluster.
template <class T, int D>
struct ColumnSum {
    const OnChip<T, D>& s;
    const Units<T>& units;
    uint32_t cluster, column;
    double limbs[2] = {0, 0};
    __int128 weight = 0;

    __device__ ColumnSum(const OnChip<T, D>& s, const Units<T>& units, uint32_t cluster, uint32_t column)
        : s(s),
          units(units),
          cluster(cluster),
          column(column) {}

    /// A finite term. What limbs cannot take goes to the cluster at once.
    __device__ __forceinline__ void add(double v, bool& odd) {
#pragma unroll
        for (int l = 0; l < 2; ++l) limbs[l] += units.take_limb(l, v);
        if (v == 0) return;
        __int128 whole;
        if (!fixed_quantise(v, units.scale, whole) || units.extreme) odd = true;
        atomic_add(reinterpret_cast<unsigned long long*>(&s.remainders[cluster * D + column]), whole);
    }
    /// COUNT rows from a place of the order on, `step` places apart, as far as they lie before `end`.
    template <int COUNT>
    __device__ __forceinline__ void add_together(uint32_t place, uint32_t end, uint32_t step, bool& odd) {
        T v[COUNT];
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            const uint32_t row = s.order[min(place + i * step, end - 1)];
            v[i] = place + i * step < end ? s.x[row * D + column] : T(0.0f);
        }
        if (units.dirty) {
#pragma unroll
            for (int i = 0; i < COUNT; ++i) {
                if (!isfinite(wide(v[i]))) v[i] = T(0.0f), odd = true;
            }
        }
        if (std::is_same<T, __half>::value || units.fit(v)) {
#pragma unroll
            for (int i = 0; i < COUNT; ++i) limbs[0] += wide(v[i]);
        } else {
#pragma unroll 1
            for (uint32_t at = place; at < min(end, place + COUNT * step); at += step) {
                const double value = wide(s.x[s.order[at] * D + column]);
                add(isfinite(value) ? value : 0, odd);
            }
        }
    }
    /// The rows at every so many places.
    __device__ __forceinline__ void add_rows(uint32_t place, uint32_t end, uint32_t step, bool& odd) {
        constexpr int TOGETHER = 8;
        for (; place < end; place += TOGETHER * step) add_together<TOGETHER>(place, end, step, odd);
    }
    /// The same times `factor`, by which the mean divides if it is a weight.
    __device__ __forceinline__ void add_rows(uint32_t place, uint32_t end, uint32_t step, const double* factor,
                                             bool weighs, int weight_scale, bool& odd) {
#pragma unroll 1
        for (; place < end; place += step) {
            const uint32_t row = s.order[place];
            const double f = factor[row];
            __int128 whole;
            if (weighs && column == 0) {
                if (!fixed_quantise(f, weight_scale, whole)) odd = true;
                weight += whole;
            }
            double v = __dmul_rn(wide(s.x[row * D + column]), f);
            if (!isfinite(v)) {
                v = 0;
                if (units.dirty && f != 0) odd = true;
            }
            add(v, odd);
        }
    }
    __device__ __forceinline__ long long limb(int l) const {
        return limbs[l] == 0 ? 0 : __double2ll_rn(limbs[l] * power_of_two(-units.unit(l)));
    }
};

/// Adds up the sorted rows: a thread to a cluster's column, and the warps share what clusters have beyond OWN_ROWS.
/// Sets `odd` if they have to be added up once more.
template <class T, int D>
__device__ void add(const OnChip<T, D>& s, uint32_t k, const Units<T>& units, const double* factor, int weight_scale,
                    int divisor, bool& odd) {
    const auto add_rows = [&](ColumnSum<T, D>& sum, uint32_t place, uint32_t end, uint32_t step) {
        if (factor) sum.add_rows(place, end, step, factor, divisor == WEIGHT, weight_scale, odd);
        else sum.add_rows(place, end, step, odd);
    };
    for (uint32_t i = threadIdx.x; i < k * D; i += blockDim.x) {
        const uint32_t j = i / D, begin = s.starts[j];
        ColumnSum<T, D> sum(s, units, j, i % D);
        add_rows(sum, begin, min(s.starts[j + 1], begin + OWN_ROWS), 1);
        s.limbs[i] = sum.limb(0), s.limbs[k * D + i] = sum.limb(1);
        if (i % D == 0) s.weights[j] = sum.weight, s.sizes[j] = s.starts[j + 1] - begin;
    }
    __syncthreads();
    const uint32_t lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
#pragma unroll 1
    for (uint32_t first = 0; first < k; first += WARP) {
        const uint32_t own = min(first + lane, k - 1);
        uint32_t left = __ballot_sync(~0u, first + lane < k && s.starts[own + 1] - s.starts[own] > OWN_ROWS);
#pragma unroll 1
        for (; left; left &= left - 1) {
            const uint32_t j = first + __ffs(left) - 1, end = s.starts[j + 1];
#pragma unroll 1
            for (uint32_t at = s.starts[j] + (1 + (threadIdx.x / WARP + j) % warps) * OWN_ROWS; at < end;
                 at += warps * OWN_ROWS) {
                ColumnSum<T, D> sum(s, units, j, lane % D);
                add_rows(sum, at + lane / D, min(end, at + OWN_ROWS), WARP / D);
#pragma unroll
                for (int l = 0; l < 2; ++l) {
                    for (int offset = D; offset < WARP; offset *= 2) {
                        sum.limbs[l] += __shfl_xor_sync(~0u, sum.limbs[l], offset);
                    }
                    const long long limb = sum.limb(l);
                    if (limb && lane < D) atomicAdd(&s.limbs[(l * k + j) * D + lane], (unsigned long long)limb);
                }
                if (sum.weight) atomic_add(reinterpret_cast<unsigned long long*>(&s.weights[j]), sum.weight);
            }
        }
    }
    __syncthreads();
}

/// Adds to a sum in shared memory, where atomics of 64 bits are loops that compare and swap: by halves, with the carry
/// that is passed on, as `atomic_add` does.
__device__ __forceinline__ void add_by_halves(unsigned long long* sum, long long v) {
    uint32_t* const halves = reinterpret_cast<uint32_t*>(sum);
    const uint32_t low = uint32_t(v), high = uint32_t(v >> 32);
    const uint32_t carry = low && atomicAdd(halves, low) > ~low;
    if (high + carry) atomicAdd(halves + 1, high + carry);
}

/// Takes the rows that have changed their cluster from the sums of the former one and adds them to the other's, a
/// thread to a row's column. No term is odd, or the sums would not be known.
template <class T, int D>
__device__ void add_changes(const OnChip<T, D>& s, const ChangedLabels& changes, uint32_t k, const Units<T>& units,
                            const double* factor, int weight_scale, int divisor) {
    const auto term_of = [](__int128* sums) { return reinterpret_cast<unsigned long long*>(sums); };
    for (uint32_t i = threadIdx.x; i < *changes.count * D; i += blockDim.x) {
        const uint32_t column = i % D, row = changes.rows[i / D], from = changes.former[i / D], to = s.labels[row];
        double v = wide(s.x[row * D + column]);
        __int128 whole;
        if (factor) {
            const double f = factor[row];
            if (divisor == WEIGHT && column == 0 && fixed_quantise(f, weight_scale, whole)) {
                atomic_add(term_of(s.weights + from), -whole), atomic_add(term_of(s.weights + to), whole);
            }
            v = __dmul_rn(v, f);
            if (!isfinite(v)) v = 0;
        }
#pragma unroll
        for (int l = 0; l < 2; ++l) {
            const double taken = units.take_limb(l, v);
            if (taken == 0) continue;
            const long long limb = __double2ll_rn(taken * power_of_two(-units.unit(l)));
            add_by_halves(&s.limbs[(l * k + from) * D + column], -limb);
            add_by_halves(&s.limbs[(l * k + to) * D + column], limb);
        }
        if (v != 0 && fixed_quantise(v, units.scale, whole)) {
            atomic_add(term_of(s.remainders + from * D + column), -whole);
            atomic_add(term_of(s.remainders + to * D + column), whole);
        }
        if (column == 0) atomicSub(&s.sizes[from], 1), atomicAdd(&s.sizes[to], 1);
    }
    __syncthreads();
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

/// Replaces the centroids `c` (k, d) but those of no weight, a thread each; returns the largest squared shift. Sets
/// `odd` if there is one that squares of f64 cannot measure.
template <class T, int D>
__device__ double replace(const OnChip<T, D>& s, T* c, uint32_t k, int d, const Units<T>& units, bool weighted,
                          int weight_scale, int divisor, bool& odd) {
    double most = 0;
#pragma unroll 1
    for (uint32_t j = threadIdx.x; j < k; j += blockDim.x) {
        double totals[D], terms[D];
        bool some = false;
#pragma unroll
        for (int q = 0; q < D; ++q) {
            __int128 sum = s.remainders[j * D + q];
#pragma unroll
            for (int l = 0; l < 2; ++l) {
                sum += __int128((long long)s.limbs[(l * k + j) * D + q]) << (units.unit(l) + units.scale);
            }
            totals[q] = fixed_value(sum, units.scale), terms[q] = __dmul_rn(totals[q], totals[q]);
            some |= totals[q] != 0;
        }
        double by = 0;
        if (divisor == NORM) {
            by = striped_here(terms);
            if (some && !(LEAST_SQUARES <= by && by <= MOST_SQUARES)) {
                odd = true;
                continue;
            }
            by = __dsqrt_rn(by);
        } else {
            by = weighted ? fixed_value(s.weights[j], weight_scale) : double(s.sizes[j]);
        }
        if (!(by > 0)) continue;
#pragma unroll
        for (int q = 0; q < D; ++q) {
            terms[q] = 0;
            if (q >= d) continue;
            const T mean = rounded<T>(__ddiv_rn(totals[q], by));
            terms[q] = squared(wide(mean), wide(c[j * d + q]));
            c[j * d + q] = mean;
        }
        const double moved = striped_here(terms);
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
        // Whether the sums are those of the labels before.
        bool done = false, tensor = TENSOR && fragment_bytes, known = false;
        for (int64_t iteration = 0;; ++iteration) {
            __syncthreads();
            if (threadIdx.x == 0) changed = 0;
            to.prepare(c, d, d, metric);
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
            const double moved =
                warp_max(odd ? 0 : replace(s, c, k, d, units, factor != nullptr, weight_scale, divisor, odd));
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
