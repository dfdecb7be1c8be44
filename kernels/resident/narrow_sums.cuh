// A problem in the shared memory of fit_narrow.cu, and how the sums of its clusters are made there: from all rows,
// which a counting sort brings into cluster order, or from the sums before and the rows that have changed their
// cluster.
#pragma once
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

/// Sorts the rows by label, and clears what is added to where limbs cannot take all.
template <class T, int D>
__device__ void sort(const OnChip<T, D>& s, uint32_t n, uint32_t k) {
    for (uint32_t i = threadIdx.x; i < k * D; i += blockDim.x) s.remainders[i] = 0;
    block_counting_sort<uint32_t>(
        n, k, blockDim.x, s.labels, [](uint32_t) { return true; }, s.starts, s.sizes, s.order);
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
