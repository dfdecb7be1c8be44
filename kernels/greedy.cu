// Blocks of greedy k-means++: rows list the candidates that are nearer than their nearest seed, and rounds, each of
// which tries several candidates, go by these lists (src/cpu/greedy.rs comes to the same).
//
// Traffic of a block: X once and a distance a row; of each row and candidate that is nearer an entry, written once; a
// round reads those of the candidate that it chooses.
#include "candidates.cuh"
#include "meet.cuh"
#include "race.cuh"

/// Every row meets the candidates: a warp takes `TOGETHER` rows at a time, a block `rows` rows.
template <class T>
__device__ void list_rows(const T* x, const Rows& r, const double* state, const double* weights, const double* norms,
                          const uint32_t* tried, int64_t trials, const uint32_t* rounds, const uint32_t* drawn,
                          int64_t count, const double* most, int metric, int64_t rows, const Nearer& nearer,
                          const uint32_t* taken, int64_t wanted) {
    __shared__ Candidates candidates;
    __shared__ unsigned long long gains[CANDIDATES];
    const int by = spread_by(metric), lane = threadIdx.x % WARP;
    const int64_t parts = (r.n + rows - 1) / rows;
    for (int64_t tile = blockIdx.x; tile < r.b * parts; tile += gridDim.x) {
        const int64_t b = tile / parts, begin = tile % parts * rows, end = min(begin + rows, r.n);
        if (taken[b] >= wanted) continue;
        candidates.find(tried + b * trials, int(trials), drawn + b * count, int(min(trials * rounds[b], count)));
        if (threadIdx.x < CANDIDATES) gains[threadIdx.x] = 0;
        __syncthreads();
        const double* const nearest = state + 2 * b * r.n;
        const Terms term = {weights ? weights + b * r.n : nullptr, potential_units(most[b], r.n)};
        const int all = candidates.count;
        for (int64_t top = begin + threadIdx.x / WARP * TOGETHER; top < end; top += blockDim.x / TRIED) {
            const auto row_at = [&](int q) { return min(top + q, end - 1); };
            const int64_t row = row_at(lane / TRIED);
            const double near = nearest[row];
            const bool counts = near > 0 && term.weight(row) > 0, own = top + lane / TRIED < end;
            unsigned long long mask = 0;
            for (int first = 0; first < all; first += TRIED) {
                const double found = met(x, r, b, row_at, near, counts, norms, candidates.rows, first, all, by);
                const int candidate = first + lane % TRIED;
                const bool is = own && found < near && found >= 0;
                if (is) {
                    nearer.add(b, candidate, row, found);
                    atomicAdd(&gains[candidate], term(row, near) - term(row, found));
                }
                const uint32_t of_row = __ballot_sync(~0u, is) >> lane / TRIED * TRIED & ((1u << TRIED) - 1);
                mask |= (unsigned long long)(of_row) << first;
            }
            if (own && lane % TRIED == 0) nearer.masks[b * r.n + row] = mask;
        }
        __syncthreads();
        if (threadIdx.x < all && gains[threadIdx.x]) {
            atomicAdd(&nearer.gains[nearer.list(b, threadIdx.x)], gains[threadIdx.x]);
        }
        __syncthreads();
    }
}

/// The state of the rounds, which the threads of a block share.
struct Chosen {
    Candidates candidates;
    /// Of each candidate when it arrives, its distance to the nearest seed, and what it takes off the potential by its
    /// list.
    double arrivals[CANDIDATES], near[CANDIDATES];
    unsigned long long gains[CANDIDATES];
    bool waits[CANDIDATES];
    /// The candidates that a round tries, and the best of them, which is -1 where the block ends.
    int tried[MOST_TRIALS];
    int trying, best;
    double now;
};

/// By the first warp: lets candidates arrive, besides those that are `trying`, until there are `enough`, and picks the
/// best. Arrivals after `last` may be those of other rows.
__device__ __forceinline__ void pick(Chosen& s, int trying, int enough, const Lowest& last, bool certain,
                                     const Terms& term) {
    const int lane = threadIdx.x % WARP;
    double now = s.now;
    while (trying < enough) {
        Lowest next = {UINT64_MAX, UINT32_MAX};
        int own = -1;
#pragma unroll
        for (int i = lane; i < CANDIDATES; i += WARP) {
            if (i >= s.candidates.count || !s.waits[i] || !(certain || s.near[i] > 0)) continue;
            const Lowest one = {ordered_key(s.arrivals[i]), s.candidates.rows[i]};
            if (after(one, next)) next = one, own = i;
        }
        const Lowest first = warp_lowest(next);
        if (first.key == UINT64_MAX || after(last, first)) break;
        if (own >= 0 && next.row == first.row) s.tried[trying] = own, s.waits[own] = false;
        now = key_of(first.key), ++trying;
        __syncwarp();
    }
    // A round of fewer is one of all that are left.
    const bool ends = trying == 0 || (trying < enough && last.key != UINT64_MAX);
    // Of equal gains that which was drawn first.
    unsigned long long gain = 0;
    int place = WARP;
    if (lane < trying) {
        const int i = s.tried[lane];
        gain = s.gains[i] + term(s.candidates.rows[i], fmax(s.near[i], 0.0)), place = lane;
    }
    for (int step = WARP / 2; step; step /= 2) {
        const unsigned long long other = __shfl_xor_sync(~0u, gain, step);
        const int other_place = __shfl_xor_sync(~0u, place, step);
        if (other > gain || (other == gain && other_place < place)) gain = other, place = other_place;
    }
    // All lanes have read what lane 0 writes.
    __syncwarp();
    if (lane == 0) s.trying = trying, s.now = now, s.best = ends ? -1 : s.tried[place];
}

/// Entries of a list that a thread has at once.
constexpr int ENTRIES = 4;

/// Lowers the distances of the rows that are nearer to candidate `best`, and postpones their arrivals: of `entries`
/// rows those of a thread. Where rounds go on, `others` is told a row that has come nearer, what it was before and is
/// now.
template <class Others>
__device__ __forceinline__ void lower_listed(const Nearer& nearer, int64_t b, int best, int64_t entries, double now,
                                             double* nearest, double* arrivals, Others others) {
    const uint32_t* const list = nearer.rows + nearer.list(b, best) * nearer.n;
    for (int64_t first = threadIdx.x; first < entries; first += ENTRIES * blockDim.x) {
        int64_t row[ENTRIES];
        double near[ENTRIES], distance[ENTRIES], arrival[ENTRIES];
#pragma unroll
        for (int i = 0; i < ENTRIES; ++i) row[i] = list[min(first + i * blockDim.x, entries - 1)];
#pragma unroll
        for (int i = 0; i < ENTRIES; ++i) {
            near[i] = nearest[row[i]], arrival[i] = arrivals[row[i]], distance[i] = nearer.distance(b, row[i], best);
        }
#pragma unroll
        for (int i = 0; i < ENTRIES; ++i) {
            if (first + i * blockDim.x >= entries || !(distance[i] < near[i])) continue;
            nearest[row[i]] = distance[i], arrivals[row[i]] = postponed(arrival[i], now, near[i], distance[i]);
            others(row[i], near[i], distance[i]);
        }
    }
}

/// The rounds of a block, whose rows `drawn` and arrivals `times` `(b, count)` are in their order: of as many rows as
/// there are trials that arrive one after another, the one that takes most off the potential is the next seed, and the
/// others wait again. Seeds go to the next of `wanted` columns of `chosen`, and `taken` counts them; they lower the
/// distances of `state` `(b, 2, n)` and postpone arrivals. `tried` are the rows of a round that does not end, and
/// `rounds` those that the next block is for. Lists are left empty. A block takes a problem, a thread a candidate.
__device__ void choose_rows(double* state, const double* weights, int64_t b_all, int64_t n, uint32_t* tried,
                            int64_t trials, uint32_t* rounds, int64_t most_rounds, const uint32_t* drawn,
                            const double* times, int64_t count, const double* most, uint64_t seed, uint64_t round,
                            int64_t first_problem, const Nearer& nearer, uint32_t* chosen, int64_t wanted,
                            uint32_t* taken) {
    __shared__ Chosen s;
    const int own = threadIdx.x;
    for (int64_t b = blockIdx.x; b < b_all; b += gridDim.x) {
        const uint32_t before = taken[b];
        if (before >= wanted) continue;
        double *const nearest = state + 2 * b * n, *const arrivals = nearest + n;
        const Terms term = {weights ? weights + b * n : nullptr, potential_units(most[b], n)};
        const int drawn_for = int(min(trials * rounds[b], count));
        const uint32_t last_row = drawn[b * count + drawn_for - 1];
        const uint64_t last_key = last_row == UINT32_MAX ? UINT64_MAX : ordered_key(times[b * count + drawn_for - 1]);
        // Rows of no probability are all that is left, in their order.
        const bool certain = times[b * count] > RACED;
        s.candidates.find(tried + b * trials, int(trials), drawn + b * count, drawn_for);
        const bool is = own < s.candidates.count;
        const int64_t own_row = is ? s.candidates.rows[own] : 0;
        const auto exponential_again = [&](uint32_t again) {
            return exponential(seed, beside(round, again), first_problem + b, own_row);
        };
        unsigned long long own_mask = 0;
        uint32_t again = 1;
        double wait = 0;
        if (is) {
            s.waits[own] = own >= s.candidates.before;
            if (!s.waits[own]) s.tried[own] = own;
            s.arrivals[own] = arrivals[own_row], s.near[own] = nearest[own_row];
            s.gains[own] = nearer.gains[nearer.list(b, own)], own_mask = nearer.masks[b * n + own_row];
            wait = exponential_again(again);
        }
        if (certain && is) s.arrivals[own] = times[b * count + s.candidates.drawn_at[own]];
        if (own == 0) s.now = 0;
        uint32_t seeds = before;
        bool dense = false;
        __syncthreads();
        while (seeds < wanted && !dense) {
            if (own < WARP) {
                pick(s, seeds == before ? s.candidates.before : 0, certain ? 1 : int(trials), {last_key, last_row},
                     certain, term);
            }
            __syncthreads();
            const int best = s.best;
            if (best < 0) break;
            const double now = s.now;
            const int64_t entries = nearer.counts[nearer.list(b, best)];
            dense = entries * DENSE_LISTS > n;
            // Others take less off what is left.
            const auto others = [&](int64_t row, double near, double distance) {
                const unsigned long long left = term(row, near) - term(row, distance);
                for (unsigned long long mask = nearer.masks[b * n + row] & ~(1ull << best); mask; mask &= mask - 1) {
                    const int other = __ffsll(mask) - 1;
                    const double to = nearer.distance(b, row, other);
                    if (!(to < near)) continue;
                    atomicAdd(&s.gains[other], 0 - (to < distance ? left : term(row, near) - term(row, to)));
                }
            };
            if (dense) {
                lower_listed(nearer, b, best, entries, now, nearest, arrivals, [](int64_t, double, double) {});
            } else {
                lower_listed(nearer, b, best, entries, now, nearest, arrivals, others);
            }
            if (is && own == best) {
                nearest[own_row] = -1, chosen[b * wanted + seeds] = uint32_t(own_row);
                if (!dense) others(own_row, s.near[own], 0);
                s.near[own] = -1;
            } else if (is) {
                const double near = s.near[own];
                if (own_mask >> best & 1) {
                    const double distance = nearer.distance(b, own_row, best);
                    if (distance < near) {
                        s.arrivals[own] = postponed(s.arrivals[own], now, near, distance), s.near[own] = distance;
                    }
                }
                bool waits = false;
                for (int t = 0; t < s.trying; ++t) waits |= s.tried[t] == own;
                if (waits) {
                    const double rate = __dmul_rn(s.near[own], term.weight(own_row));
                    s.arrivals[own] = fmin(__dadd_rn(now, __ddiv_rn(wait, rate)), RACED), s.waits[own] = true;
                    wait = exponential_again(++again);
                }
            }
            ++seeds;
            __syncthreads();
        }
        // A round that has not ended goes on in the next block.
        const bool ended = seeds == wanted || dense;
        if (own < trials)
            tried[b * trials + own] = !ended && own < s.trying ? s.candidates.rows[s.tried[own]] : UINT32_MAX;
        if (is) {
            if (!certain) arrivals[own_row] = s.arrivals[own];
            nearer.counts[nearer.list(b, own)] = 0, nearer.gains[nearer.list(b, own)] = 0;
        }
        if (own == 0) {
            const int64_t chose = seeds - before;
            taken[b] = seeds, rounds[b] = uint32_t(dense ? 1 : min(chose + 1 + chose / 2, most_rounds));
        }
        __syncthreads();
    }
}

#define INSTANCE(name, T)                                                                                              \
    extern "C" __global__ void __launch_bounds__(SEED_THREADS, sizeof(T) > 4 ? 2 : 3) list_##name(                     \
        const T* x, Rows r, const double* state, const double* weights, const double* norms, const uint32_t* tried,    \
        int64_t trials, const uint32_t* rounds, const uint32_t* drawn, int64_t count, const double* most, int metric,  \
        int64_t rows, uint32_t* counts, uint32_t* nearer_rows, unsigned long long* gains, unsigned long long* masks,   \
        double* distances, int64_t room, const uint32_t* taken, int64_t wanted) {                                      \
        list_rows(x, r, state, weights, norms, tried, trials, rounds, drawn, count, most, metric, rows,                \
                  {counts, nearer_rows, gains, masks, distances, r.n, room}, taken, wanted);                           \
    }
FOR_EACH_TYPE(INSTANCE)
#undef INSTANCE

extern "C" __global__ void __launch_bounds__(CHOICE_THREADS, 1)
    choose(double* state, const double* weights, int64_t b, int64_t n, uint32_t* tried, int64_t trials,
           uint32_t* rounds, int64_t most_rounds, const uint32_t* drawn, const double* times, int64_t count,
           const double* most, uint64_t seed, uint64_t round, int64_t first_problem, uint32_t* counts,
           uint32_t* nearer_rows, unsigned long long* gains, unsigned long long* masks, double* distances, int64_t room,
           uint32_t* chosen, int64_t wanted, uint32_t* taken) {
    choose_rows(state, weights, b, n, tried, trials, rounds, most_rounds, drawn, times, count, most, seed, round,
                first_problem, {counts, nearer_rows, gains, masks, distances, n, room}, chosen, wanted, taken);
}
