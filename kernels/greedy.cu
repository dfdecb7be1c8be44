// Blocks of greedy k-means++: rows list the candidates that are nearer than their nearest seed, and rounds, each of
// which tries several candidates, go by these lists (src/cpu/greedy.rs says the same).
//
// Traffic of a block: X once and a distance a row; of each row and candidate that is nearer an entry, written once and
// read by the rounds that try the candidate.
#include "candidates.cuh"
#include "meet.cuh"
#include "race.cuh"

__device__ __forceinline__ unsigned long long warp_sum(unsigned long long v) {
    for (int lane = WARP / 2; lane; lane /= 2) v += __shfl_xor_sync(~0u, v, lane);
    return v;
}

/// Every row meets the candidates: a warp takes `TOGETHER` rows at a time, a block `rows` rows.
template <class T>
__device__ void list_rows(const T* x, const Rows& r, const double* state, const double* weights, const double* norms,
                          const uint32_t* tried, int64_t trials, const uint32_t* rounds, const uint32_t* drawn,
                          int64_t count, int metric, int64_t rows, const Lists& lists, const uint32_t* taken,
                          int64_t wanted) {
    __shared__ Candidates candidates;
    const int by = spread_by(metric);
    const int64_t parts = (r.n + rows - 1) / rows;
    for (int64_t tile = blockIdx.x; tile < r.b * parts; tile += gridDim.x) {
        const int64_t b = tile / parts, begin = tile % parts * rows, end = min(begin + rows, r.n);
        if (taken[b] >= wanted) continue;
        candidates.find(tried + b * trials, int(trials), drawn + b * count, int(min(trials * rounds[b], count)));
        const double* const nearest = state + 2 * b * r.n;
        const int lane = threadIdx.x % WARP, all = candidates.count;
        for (int64_t top = begin + threadIdx.x / WARP * TOGETHER; top < end; top += blockDim.x / TRIED) {
            const auto row_at = [&](int q) { return min(top + q, end - 1); };
            const int64_t row = row_at(lane / TRIED);
            const double near = nearest[row];
            const bool counts = near > 0 && (weights ? weights[b * r.n + row] : 1.0) > 0,
                       own = top + lane / TRIED < end;
            for (int first = 0; first < all; first += TRIED) {
                const double found = met(x, r, b, row_at, near, counts, norms, candidates.rows, first, all, by);
                if (own && found < near && found >= 0) lists.add(b, first + lane % TRIED, row, found);
            }
        }
        __syncthreads();
    }
}

/// The rounds of a block, whose rows `drawn` and arrivals `times` `(b, count)` are in their order: of as many rows as
/// there are trials that arrive one after another, the one that takes most off the potential is the next seed, and the
/// others wait again. Seeds go to the next of `wanted` columns of `chosen`, and `taken` counts them; they lower the
/// distances of `state` `(b, 2, n)` and postpone arrivals. `tried` are the rows of a round that does not end, and
/// `rounds` those that the next block is for. Lists are left empty. A block takes a problem.
__device__ void choose_rows(double* state, const double* weights, int64_t b_all, int64_t n, uint32_t* tried_all,
                            int64_t trials, uint32_t* rounds, int64_t most_rounds, const uint32_t* drawn,
                            const double* times, int64_t count, const double* most, uint64_t seed, uint64_t round,
                            int64_t first_problem, const Lists& lists, uint32_t* chosen, int64_t wanted,
                            uint32_t* taken) {
    __shared__ Candidates candidates;
    __shared__ double arrivals[CANDIDATES], near[CANDIDATES];
    __shared__ uint32_t again[CANDIDATES];
    __shared__ bool waits[CANDIDATES];
    __shared__ int tried[MOST_TRIALS];
    __shared__ unsigned long long gains[MOST_TRIALS];
    __shared__ int trying, best;
    __shared__ double now;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
    for (int64_t b = blockIdx.x; b < b_all; b += gridDim.x) {
        if (taken[b] >= wanted) continue;
        double *const nearest = state + 2 * b * n, *const row_arrivals = nearest + n;
        const auto weight_of = [&](int64_t row) { return weights ? weights[b * n + row] : 1.0; };
        const int drawn_for = int(min(trials * rounds[b], count));
        const uint32_t last_row = drawn[b * count + drawn_for - 1];
        // After this one other rows may arrive.
        const Lowest last = {last_row == UINT32_MAX ? UINT64_MAX : ordered_key(times[b * count + drawn_for - 1]),
                             last_row};
        // Rows of no probability are all that is left, in their order.
        const bool certain = times[b * count] > RACED;
        const int enough = certain ? 1 : int(trials);
        const double units = potential_units(most[b], n);
        candidates.find(tried_all + b * trials, int(trials), drawn + b * count, drawn_for);
        if (threadIdx.x == 0) trying = candidates.before, now = 0;
        if (threadIdx.x < candidates.before) tried[threadIdx.x] = threadIdx.x;
        if (threadIdx.x < candidates.count) {
            const int i = threadIdx.x;
            const bool fresh = i >= candidates.before;
            arrivals[i] = fresh ? times[b * count + candidates.drawn_at[i]] : 0;
            near[i] = nearest[candidates.rows[i]], again[i] = 0, waits[i] = fresh;
        }
        const uint32_t before = taken[b];
        uint32_t seeds = before;
        __syncthreads();
        while (seeds < wanted) {
            if (warp == 0) {
                while (trying < enough) {
                    Lowest next = {UINT64_MAX, UINT32_MAX};
                    int own = -1;
                    for (int i = lane; i < candidates.count; i += WARP) {
                        const Lowest one = {ordered_key(arrivals[i]), candidates.rows[i]};
                        if (waits[i] && (certain || near[i] > 0) && after(one, next)) next = one, own = i;
                    }
                    const Lowest first = warp_lowest(next);
                    if (first.key == UINT64_MAX || after(last, first)) break;
                    if (own >= 0 && next.row == first.row) {
                        tried[trying] = own, waits[own] = false, now = arrivals[own];
                    }
                    __syncwarp();
                    if (lane == 0) ++trying;
                    __syncwarp();
                }
                if (lane < MOST_TRIALS) gains[lane] = 0;
            }
            __syncthreads();
            // A round of fewer is one of all that are left.
            if (trying == 0 || (trying < enough && last.key != UINT64_MAX)) break;
            const auto term = [&](int64_t row, double distance) {
                return whole(__dmul_rn(distance, weight_of(row)), units);
            };
            if (enough > 1) {
                // What each takes off the potential: some warps for each.
                const int each = max(1, warps / trying);
                for (int t = warp / each; t < trying && warp < each * trying; t += warps / each) {
                    const int candidate = tried[t];
                    const int64_t list = lists.at(b, candidate);
                    const int64_t entries = lists.counts[list];
                    unsigned long long gain = 0;
                    for (int64_t e = warp % each * WARP + lane; e < entries; e += each * WARP) {
                        const int64_t row = lists.rows[list * n + e];
                        const double distance = lists.distances[list * n + e], before_it = nearest[row];
                        if (distance < before_it) gain += term(row, before_it) - term(row, distance);
                    }
                    if (warp % each == 0 && lane == 0) gain += term(candidates.rows[candidate], near[candidate]);
                    gain = warp_sum(gain);
                    if (lane == 0) atomicAdd(&gains[t], gain);
                }
            }
            __syncthreads();
            if (threadIdx.x == 0) {
                // Of equal ones the one that was drawn first.
                int first = 0;
                for (int t = 1; t < trying; ++t) {
                    if (gains[t] > gains[first]) first = t;
                }
                best = tried[first];
                chosen[b * wanted + seeds] = candidates.rows[best];
            }
            __syncthreads();
            const int64_t list = lists.at(b, best), entries = lists.counts[list];
            for (int64_t e = threadIdx.x; e < entries; e += blockDim.x) {
                const int64_t row = lists.rows[list * n + e];
                const double distance = lists.distances[list * n + e], before_it = nearest[row];
                if (distance < before_it) {
                    row_arrivals[row] = postponed(row_arrivals[row], now, before_it, distance);
                    nearest[row] = distance;
                }
            }
            if (threadIdx.x == 0) nearest[candidates.rows[best]] = -1;
            __syncthreads();
            if (threadIdx.x < candidates.count) {
                const int i = threadIdx.x;
                const double lowered = nearest[candidates.rows[i]];
                if (lowered < near[i]) arrivals[i] = postponed(arrivals[i], now, near[i], lowered), near[i] = lowered;
            }
            __syncthreads();
            if (threadIdx.x < trying && tried[threadIdx.x] != best) {
                const int i = tried[threadIdx.x];
                const int64_t row = candidates.rows[i];
                const double wait = exponential(seed, beside(round, ++again[i]), first_problem + b, row);
                const double rate = __dmul_rn(near[i], weight_of(row));
                arrivals[i] = fmin(__dadd_rn(now, __ddiv_rn(wait, rate)), RACED);
                row_arrivals[row] = arrivals[i], waits[i] = true;
            }
            __syncthreads();
            if (threadIdx.x == 0) trying = 0;
            ++seeds;
            __syncthreads();
        }
        __syncthreads();
        if (threadIdx.x < trials) {
            const int i = threadIdx.x;
            tried_all[b * trials + i] = i < trying ? candidates.rows[tried[i]] : UINT32_MAX;
        }
        if (threadIdx.x < candidates.count) lists.counts[lists.at(b, threadIdx.x)] = 0;
        if (threadIdx.x == 0) {
            const int64_t own = seeds - before;
            taken[b] = seeds, rounds[b] = uint32_t(min(own + 1 + own / 2, most_rounds));
        }
        __syncthreads();
    }
}

#define INSTANCE(name, T)                                                                                              \
    extern "C" __global__ void __launch_bounds__(SEED_THREADS, sizeof(T) > 4 ? 2 : 3)                                  \
        list_##name(const T* x, Rows r, const double* state, const double* weights, const double* norms,               \
                    const uint32_t* tried, int64_t trials, const uint32_t* rounds, const uint32_t* drawn,              \
                    int64_t count, int metric, int64_t rows, uint32_t* list_rows_, uint32_t* list_counts,              \
                    double* list_distances, int64_t room, const uint32_t* taken, int64_t wanted) {                     \
        list_rows(x, r, state, weights, norms, tried, trials, rounds, drawn, count, metric, rows,                      \
                  {list_rows_, list_counts, list_distances, r.n, room}, taken, wanted);                                \
    }
FOR_EACH_TYPE(INSTANCE)
#undef INSTANCE

extern "C" __global__ void __launch_bounds__(CHOICE_THREADS)
    choose(double* state, const double* weights, int64_t b, int64_t n, uint32_t* tried, int64_t trials,
           uint32_t* rounds, int64_t most_rounds, const uint32_t* drawn, const double* times, int64_t count,
           const double* most, uint64_t seed, uint64_t round, int64_t first_problem, uint32_t* list_rows,
           uint32_t* list_counts, double* list_distances, int64_t room, uint32_t* chosen, int64_t wanted,
           uint32_t* taken) {
    choose_rows(state, weights, b, n, tried, trials, rounds, most_rounds, drawn, times, count, most, seed, round,
                first_problem, {list_rows, list_counts, list_distances, n, room}, chosen, wanted, taken);
}
