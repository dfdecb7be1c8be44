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

/// What a block of threads shares that goes through the rounds.
struct Chosen {
    Candidates candidates;
    /// Of each candidate when it arrives, its distance to the nearest seed, what it takes off the potential by its list,
    /// the exponential variate by which it waits again, and how often it has.
    double arrivals[CANDIDATES], near[CANDIDATES];
    unsigned long long gains[CANDIDATES];
    double wait[CANDIDATES];
    uint32_t again[CANDIDATES];
    bool waits[CANDIDATES];
    /// Those that a round tries, and the best.
    int tried[MOST_TRIALS];
    int trying, best;
    double now;
    bool ends;
};

/// By the first warp: lets candidates arrive until there are `enough`, and picks the best. Arrivals after `last` may be
/// those of other rows.
__device__ __forceinline__ void pick(Chosen& s, int enough, const Lowest& last, bool certain, const Terms& term) {
    const int lane = threadIdx.x % WARP;
    int trying = s.trying;
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
    if (lane == 0) s.trying = trying, s.now = now, s.ends = ends, s.best = ends ? -1 : s.tried[place];
    __syncwarp();
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
        const uint64_t last_key =
            last_row == UINT32_MAX ? UINT64_MAX : ordered_key(times[b * count + drawn_for - 1]);
        // Rows of no probability are all that is left, in their order.
        const bool certain = times[b * count] > RACED;
        s.candidates.find(tried + b * trials, int(trials), drawn + b * count, drawn_for);
        const bool is = own < s.candidates.count;
        const int64_t own_row = is ? s.candidates.rows[own] : 0;
        const auto exponential_again = [&] {
            return exponential(seed, beside(round, s.again[own] + 1), first_problem + b, own_row);
        };
        unsigned long long own_mask = 0;
        if (is) {
            const bool fresh = own >= s.candidates.before;
            if (!fresh) s.tried[own] = own;
            s.arrivals[own] = fresh ? times[b * count + s.candidates.drawn_at[own]] : 0;
            s.near[own] = nearest[own_row], s.again[own] = 0, s.waits[own] = fresh;
            s.gains[own] = nearer.gains[nearer.list(b, own)], own_mask = nearer.masks[b * n + own_row];
            s.wait[own] = exponential_again();
        }
        if (own == 0) s.trying = s.candidates.before, s.now = 0;
        uint32_t seeds = before;
        __syncthreads();
        while (seeds < wanted) {
            if (threadIdx.x < WARP) pick(s, certain ? 1 : int(trials), {last_key, last_row}, certain, term);
            __syncthreads();
            if (s.ends) break;
            const int best = s.best;
            const int64_t list = nearer.list(b, best), entries = nearer.counts[list];
            for (int64_t e = threadIdx.x; e < entries; e += blockDim.x) {
                const int64_t row = nearer.rows[list * n + e];
                const double near = nearest[row], distance = nearer.distance(b, row, best), arrival = arrivals[row];
                unsigned long long others = nearer.masks[b * n + row] & ~(1ull << best);
                if (!(distance < near)) continue;
                nearest[row] = distance, arrivals[row] = postponed(arrival, s.now, near, distance);
                // Others take less off what is left.
                for (const unsigned long long left = term(row, near) - term(row, distance); others; others &= others - 1) {
                    const int other = __ffsll(others) - 1;
                    const double to = nearer.distance(b, row, other);
                    if (!(to < near)) continue;
                    const unsigned long long less = to < distance ? left : term(row, near) - term(row, to);
                    atomicAdd(&s.gains[other], 0 - less);
                }
            }
            if (is && own == best) {
                nearest[own_row] = -1;
                for (unsigned long long others = own_mask; others; others &= others - 1) {
                    const int other = __ffsll(others) - 1;
                    const double to = nearer.distance(b, own_row, other);
                    if (to < s.near[own]) atomicAdd(&s.gains[other], 0 - (term(own_row, s.near[own]) - term(own_row, to)));
                }
                s.near[own] = -1, chosen[b * wanted + seeds] = uint32_t(own_row);
            } else if (is && own_mask >> best & 1) {
                const double distance = nearer.distance(b, own_row, best), near = s.near[own];
                if (distance < near) {
                    s.arrivals[own] = postponed(s.arrivals[own], s.now, near, distance), s.near[own] = distance;
                }
            }
            __syncthreads();
            bool again = false;
            for (int t = 0; is && t < s.trying; ++t) again |= s.tried[t] == own && own != best;
            if (again) {
                const double rate = __dmul_rn(s.near[own], term.weight(own_row));
                const double arrival = fmin(__dadd_rn(s.now, __ddiv_rn(s.wait[own], rate)), RACED);
                arrivals[own_row] = s.arrivals[own] = arrival, s.waits[own] = true, ++s.again[own];
            }
            __syncthreads();
            if (again) s.wait[own] = exponential_again();
            if (own == 0) s.trying = 0;
            ++seeds;
            __syncthreads();
        }
        __syncthreads();
        if (own < trials) {
            tried[b * trials + own] = own < s.trying && seeds < wanted ? s.candidates.rows[s.tried[own]] : UINT32_MAX;
        }
        if (is) nearer.counts[nearer.list(b, own)] = 0, nearer.gains[nearer.list(b, own)] = 0;
        if (own == 0) {
            const int64_t chose = seeds - before;
            taken[b] = seeds, rounds[b] = uint32_t(min(chose + 1 + chose / 2, most_rounds));
        }
        __syncthreads();
    }
}

#define INSTANCE(name, T)                                                                                              \
    extern "C" __global__ void __launch_bounds__(SEED_THREADS, sizeof(T) > 4 ? 2 : 3)                                  \
        list_##name(const T* x, Rows r, const double* state, const double* weights, const double* norms,               \
                    const uint32_t* tried, int64_t trials, const uint32_t* rounds, const uint32_t* drawn,              \
                    int64_t count, const double* most, int metric, int64_t rows, uint32_t* counts,                     \
                    uint32_t* nearer_rows, unsigned long long* gains, unsigned long long* masks, double* distances,    \
                    int64_t room, const uint32_t* taken, int64_t wanted) {                                             \
        list_rows(x, r, state, weights, norms, tried, trials, rounds, drawn, count, most, metric, rows,                \
                  {counts, nearer_rows, gains, masks, distances, r.n, room}, taken, wanted);                           \
    }
FOR_EACH_TYPE(INSTANCE)
#undef INSTANCE

extern "C" __global__ void __launch_bounds__(CHOICE_THREADS, 1)
    choose(double* state, const double* weights, int64_t b, int64_t n, uint32_t* tried, int64_t trials,
           uint32_t* rounds, int64_t most_rounds, const uint32_t* drawn, const double* times, int64_t count,
           const double* most, uint64_t seed, uint64_t round, int64_t first_problem, uint32_t* counts,
           uint32_t* nearer_rows, unsigned long long* gains, unsigned long long* masks, double* distances,
           int64_t room, uint32_t* chosen, int64_t wanted, uint32_t* taken) {
    choose_rows(state, weights, b, n, tried, trials, rounds, most_rounds, drawn, times, count, most, seed, round,
                first_problem, {counts, nearer_rows, gains, masks, distances, n, room}, chosen, wanted, taken);
}
