// A block's share of the sums and of the means.
#pragma once
#include "resident/fit.cuh"
#include "resident/marked.cuh"
#include "scan.cuh"

/// Brings the rows that count into the order of their clusters.
template <class T, bool FACTOR>
__device__ void Fit<T, FACTOR>::sort() const {
    clear();
    block_counting_sort<int>(
        live, k, THREADS_HERE, s.labels, [&](int row) { return counts(row); }, s.begins, s.next, s.order);
}

/// Adds up the block's rows of each cluster, a warp's, two columns of a line to a lane. Says whether it marks any.
template <class T, bool FACTOR>
template <int LINES>
__device__ void Fit<T, FACTOR>::add(const Units<T>& units, int weight_scale, uint32_t* marked) const {
    const int lane = threadIdx.x % WARP, line_bytes = shares.rows * LINE;
    const uint8_t* const rows = s.rows + lane % 4 * 4;
    double per_unit[LIMBS];
#pragma unroll
    for (int l = 0; l < LIMBS; ++l) per_unit[l] = units.extreme ? 0 : power_of_two(-units.unit(l));
    // Blocks begin at different clusters, for they should not add to the same ones at the same time.
    const int ahead = rank * k / shares.blocks;
#pragma unroll 1
    for (int i = threadIdx.x / WARP; i < k; i += WARPS) {
        const int j = i + ahead < k ? i + ahead : i + ahead - k;
        const int begin = s.begins[j], end = s.begins[j + 1];
        if (begin == end) continue;
        double sums[LIMBS][LINES][2] = {};
        __int128 weight = 0;
        bool odd = false;
#pragma unroll 2
        for (int place = begin; place < end; ++place) {
            const int row = s.order[place];
            const uint8_t* const at = rows + swizzled<LINE>(row, lane / 4);
            const double f = FACTOR ? s.factor[row] : 1;
            if (FACTOR && divisor == WEIGHT) {
                __int128 q;
                odd |= !fixed_quantise(f, weight_scale, q);
                weight += q;
            }
#pragma unroll
            for (int line = 0; line < LINES; ++line) {
                const uint32_t two = *reinterpret_cast<const uint32_t*>(at + line * line_bytes);
                struct alignas(4) Pair {
                    T values[2];
                } const pair = reinterpret_cast<const Pair&>(two);
                if (!FACTOR && (EXACT || units.fit(pair.values))) {
                    sums[0][line][0] += Small<T>::low(two), sums[0][line][1] += Small<T>::high(two);
                    continue;
                }
                take(pair.values, f, units, j, line * LINE_COLUMNS + 2 * lane, sums, line, odd);
            }
        }
#pragma unroll
        for (int l = 0; l < LIMBS; ++l) {
            unsigned long long* const limbs = to.limbs + (l * k + j) * (LINES * LINE_COLUMNS) + lane;
#pragma unroll
            for (int line = 0; line < LINES; ++line) {
#pragma unroll
                for (int q = 0; q < 2; ++q) {
                    const double sum = FACTOR ? sums[l][line][q] : sums[l][line][q] * power_of_two(Small<T>::SCALE);
                    atomicAdd(limbs + line * LINE_COLUMNS + q * WARP,
                              (unsigned long long)__double2ll_rn(sum * per_unit[l]));
                }
            }
        }
        if (!EXACT) odd = __any_sync(~0u, odd);
        if (lane) continue;
        if (odd) atomicOr(to.sizes + j, ODD), *marked = 1;
        if (FACTOR) atomic_add(to.weights + 2 * j, weight);
        else atomicAdd(to.sizes + j, end - begin);
    }
}

/// Adds two columns' terms that need to be cut; what limbs do not take goes to the common remainders.
template <class T, bool FACTOR>
template <int LINES>
__device__ __forceinline__ void Fit<T, FACTOR>::take(const T (&values)[2], double f, const Units<T>& units, int j,
                                                     int column, double (&sums)[LIMBS][LINES][2], int line,
                                                     bool& odd) const {
#pragma unroll
    for (int q = 0; q < 2; ++q) {
        double v = __dmul_rn(wide(values[q]), f);
        if (!isfinite(v)) v = 0;
#pragma unroll
        for (int l = 0; l < LIMBS; ++l) {
            const double limb = units.take_limb(l, v);
            sums[l][line][q] += FACTOR ? limb : limb * power_of_two(-Small<T>::SCALE);
        }
        if (v != 0) {
            __int128 whole;
            odd |= !fixed_quantise(v, units.scale, whole) || units.extreme;
            atomic_add(to.remainders + 2 * (j * d + column + q), whole);
        }
    }
}

template <class T, bool FACTOR>
__device__ void Fit<T, FACTOR>::add(const Units<T>& units, int weight_scale, uint32_t* marked) const {
    static_assert(TEAM_COLUMNS == 4 * LINE_COLUMNS, "so many lines");
    if (lines == 1) add<1>(units, weight_scale, marked);
    else if (lines == 2) add<2>(units, weight_scale, marked);
    else if (lines == 3) add<3>(units, weight_scale, marked);
    else add<4>(units, weight_scale, marked);
}

/// Brings the sums of the block's share of the clusters to `totals`, and leaves zeros where they were.
template <class T, bool FACTOR>
__device__ __forceinline__ void Fit<T, FACTOR>::collect(const Units<T>& units, int owned) const {
    for (int i = threadIdx.x; i < owned * d; i += THREADS_HERE) {
        const int j = rank + i / d * shares.blocks, column = i % d;
        __int128 total = 0;
#pragma unroll
        for (int l = 0; l < LIMBS; ++l) {
            unsigned long long* const limb = to.limbs + (l * k + j) * width() + place_of(column);
            total += __int128((long long)__ldcg(limb)) << (units.unit(l) + units.scale);
            *limb = 0;
        }
        if (!EXACT) {
            unsigned long long* const remainder = to.remainders + 2 * (j * d + column);
            const unsigned long long low = __ldcg(remainder), high = __ldcg(remainder + 1);
            if (low | high) total += __int128(high) << 64 | low, remainder[0] = remainder[1] = 0;
        }
        s.totals[i] = fixed_value(total, units.scale);
    }
}

/// Replaces centroid `j` by its sums over what they are divided by, a warp's.
template <class T, bool FACTOR>
__device__ __forceinline__ void Fit<T, FACTOR>::replace(int j, const double* totals, double by, double* shift) const {
    double moved = 0;
    publish(j, [&](int q) {
        const T mean = rounded<T>(__ddiv_rn(totals[q], by)), old = c[j * d + q];
        moved = __dadd_rn(moved, squared(wide(mean), wide(old)));
        c[j * d + q] = mean;
        return mean;
    });
    moved = striped(moved);
    if (threadIdx.x % WARP == 0 && !(moved == 0)) atomic_max(shift, moved == moved ? moved : INFINITY);
}

/// Replaces the block's share of the centroids, every so many, but those of no weight and those of marked clusters.
template <class T, bool FACTOR>
__device__ void Fit<T, FACTOR>::replace(const Units<T>& units, int weight_scale, double* shift,
                                        uint32_t* marked) const {
    const int lane = threadIdx.x % WARP, owned = this->owned();
    collect(units, owned);
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x / WARP; i < owned; i += WARPS) {
        const int j = rank + i * shares.blocks;
        const uint32_t size = __ldcg(to.sizes + j);
        if (size & ODD) continue;
        const double* const totals = s.totals + i * d;
        unsigned long long low = 0, high = 0;
        if (FACTOR) low = __ldcg(to.weights + 2 * j), high = __ldcg(to.weights + 2 * j + 1);
        double by = 0;
        if (divisor == NORM) {
            double squares = 0;
            bool some = false;
            for (int q = lane; q < d; q += WARP) {
                squares = __dadd_rn(squares, __dmul_rn(totals[q], totals[q])), some |= totals[q] != 0;
            }
            squares = striped(squares);
            // A cluster is marked that squares of f64 cannot measure.
            if (!EXACT && !(LEAST_SQUARES <= squares && squares <= MOST_SQUARES) && __any_sync(~0u, some)) {
                if (lane == 0) to.sizes[j] = size | ODD, *marked = 1;
                continue;
            }
            by = __dsqrt_rn(squares);
        } else {
            by = FACTOR ? fixed_value(__int128(high) << 64 | low, weight_scale) : size;
        }
        __syncwarp();
        if (lane == 0) {
            if (FACTOR) to.weights[2 * j] = to.weights[2 * j + 1] = 0;
            else to.sizes[j] = 0;
        }
        if (by > 0) replace(j, totals, by, shift);
    }
}

/// Adds up marked clusters once more and replaces the block's share of their centroids, when all others have been.
/// `labels` (n) is where blocks tell each other theirs for that. Blocks meet here twice; `all` is how often they had
/// arrived before.
template <class T, bool FACTOR>
__device__ void Fit<T, FACTOR>::replace_marked(double* shift, uint32_t* labels, uint32_t all) const {
    const int lane = threadIdx.x % WARP, owned = this->owned();
    for (int i = threadIdx.x; i < live; i += THREADS_HERE) labels[rank * shares.rows + i] = s.labels[i];
    sync_team(to.arrived, all + shares.blocks);
    const int64_t before = int64_t(rank) * shares.rows;
    add_exactly<T, FACTOR>(x - (live ? before : 0) * r.row_stride, r.row_stride, r.n, d,
                           FACTOR ? factor - before : nullptr, dirty, labels, owned, rank, shares.blocks, to.sizes,
                           to.weights, s.totals, exponents());
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x / WARP; i < owned; i += WARPS) {
        const int j = rank + i * shares.blocks;
        const uint32_t size = __ldcg(to.sizes + j);
        if (!(size & ODD)) continue;
        Scaled weight = scaled(double(size & ~ODD));
        if (FACTOR) {
            const unsigned long long low = __ldcg(to.weights + 2 * j), high = __ldcg(to.weights + 2 * j + 1);
            weight = {__longlong_as_double(low), int64_t(high)};
        }
        double* const totals = s.totals + i * d;
        const bool some = divide(divisor, weight, d, totals, exponents() + i * d);
        __syncwarp();
        if (lane == 0) {
            if (FACTOR) to.weights[2 * j] = to.weights[2 * j + 1] = 0;
            to.sizes[j] = 0;
        }
        if (some) replace(j, totals, 1, shift);
    }
    sync_team(to.arrived, all + 2 * shares.blocks);
}

/// `Fit::replace_marked`, which few fits need. It is not inlined and takes a copy, so that the others keep their
/// registers.
template <class T, bool FACTOR>
__device__ __noinline__ void replace_marked(Fit<T, FACTOR> fit, double* shift, uint32_t* labels, uint32_t all) {
    fit.replace_marked(shift, labels, all);
}
