// Sums that are exact and do not depend on their order (src/fixed.rs): how terms are cut into f64 "limbs", the sums of
// terms that no integer of their problem's scale holds, and what sums are divided by.
#pragma once
#include "exact/common.cuh"

/// Bits of a limb's terms: with their sign and 10 more for their sum they fit the 53 of an f64.
constexpr int LIMB_BITS = 42;

/// A sum is divided by one of these: the weight of its cluster, the norm of the sums, or nothing.
enum Divisor : int { WEIGHT = 0, NORM = 1, ONE = 2 };

/// Between these a sum of squares has lost nothing to the range of f64 that matters.
constexpr double LEAST_SQUARES = 0x1p-900, MOST_SQUARES = 0x1p+1000;

/// A number of 53 bits with any exponent (`Scaled` in src/fixed.rs).
struct alignas(16) Scaled {
    double significand;  // zero, or at least 1 and below 2 in magnitude
    int64_t exponent;

    /// The quotient, rounded once to an f64.
    __device__ __forceinline__ double over(const Scaled& divisor) const {
        // Both sides of a division that has the right exponent: it alone rounds, to a subnormal, too.
        const int e = int(max(int64_t(-2040), min(int64_t(2040), exponent - divisor.exponent))), half = e / 2;
        return __ddiv_rn(__dmul_rn(significand, power_of_two(half)),
                         __dmul_rn(divisor.significand, power_of_two(half - e)));
    }
    /// Times `2^-shift`; infinite beyond the range of an f64.
    __device__ __forceinline__ double value(int64_t shift) const { return over({1, shift}); }
};

/// `(high * 2^64 + low) * 2^e`, rounded to nearest even.
__device__ __forceinline__ Scaled scaled(uint64_t high, uint64_t low, int e, bool negative) {
    if (!(high | low)) return {0, 0};
    // The highest 64 bits, the last one set if anything below them is.
    const int above = high ? __clzll(high) : 64 + __clzll(low);
    const unsigned __int128 m = (unsigned __int128)((unsigned __int128)high << 64 | low) << above;
    const uint64_t bits = __double_as_longlong(__ull2double_rn(uint64_t(m >> 64) | (uint64_t(m) != 0)));
    const double significand = __longlong_as_double((bits & ((1ull << 52) - 1)) | 1023ull << 52);
    return {negative ? -significand : significand, int(bits >> 52) - 1023 + 64 - above + e};
}

/// A finite `v`.
__device__ __forceinline__ Scaled scaled(double v) {
    const uint64_t bits = __double_as_longlong(v), fraction = bits & ((1ull << 52) - 1);
    const int biased = int(bits >> 52) & 0x7ff;
    return scaled(0, biased ? fraction | 1ull << 52 : fraction, biased ? biased - 1075 : -1074, bits >> 63);
}

/// The bits between the units of two neighbouring planes of a sum (`Grid` in src/fixed.rs).
constexpr int PLANE_BITS = 64;

/// A sum of which `at(plane)` are the integers, the first in units of 2^-scale, rounded once.
template <class At>
__device__ __forceinline__ Scaled scaled(int planes, int scale, At at) {
    for (bool negative = false;; negative = true) {
        __int128 carried = 0;
        uint64_t below = 0, low = 0, high = 0, lower = 0;
        int e = 0;
        const auto take = [&](uint64_t digit, int unit) {
            // The highest digit and the one below are at least 65 bits; whether there are any below them is one more.
            if (digit) high = digit, lower = low | (below != 0), e = unit - PLANE_BITS;
            below |= low, low = digit;
        };
        for (int plane = planes - 1; plane >= 0; --plane) {
            const __int128 v = carried + (negative ? -at(plane) : at(plane));
            take(uint64_t(v), -scale - PLANE_BITS * plane);
            carried = v >> 64;
        }
        if (carried < 0) continue;
        take(uint64_t(carried), 64 - scale);
        return scaled(high, lower, e, negative);
    }
}

/// A sum of up to 2^32 numbers of any exponent (Kulisch and Miranker 1986; rounded as a `Grid` of src/fixed.rs is), by
/// a warp: word `lane + 32 i` of it is a lane's i-th.
struct Exact {
    static constexpr int WORD_BITS = 30, WORDS = 72, EACH = (WORDS + WARP - 1) / WARP;
    static constexpr uint32_t DIGIT = (1u << WORD_BITS) - 1;
    long long words[EACH] = {};

    /// Adds `magnitude * 2^e`, a sum of f64, the same in all lanes.
    __device__ __forceinline__ void add(uint64_t magnitude, int e, bool negative) {
        const int place = e + 1074;
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            // The bit that the word begins with.
            const int at = (int(threadIdx.x % WARP) + i * WARP) * WORD_BITS - place;
            uint64_t digit = 0;
            if (at >= 0 && at < 64) digit = magnitude >> at & DIGIT;
            if (at < 0 && at > -WORD_BITS) digit = magnitude << -at & DIGIT;
            words[i] += negative ? -int64_t(digit) : int64_t(digit);
        }
    }
    __device__ __forceinline__ void add(double v) {
        const uint64_t bits = __double_as_longlong(v), fraction = bits & ((1ull << 52) - 1);
        const int biased = int(bits >> 52) & 0x7ff;
        if (biased < 0x7ff) add(biased ? fraction | 1ull << 52 : fraction, biased ? biased - 1075 : -1074, bits >> 63);
    }
    __device__ __forceinline__ void add(__int128 q, int scale) {
        const unsigned __int128 magnitude = q < 0 ? -(unsigned __int128)q : q;
        add(uint64_t(magnitude), -scale, q < 0);
        add(uint64_t(magnitude >> 64), 64 - scale, q < 0);
    }

    /// Hands `take(word, digit)` the words as digits, lowest first, to all lanes. Returns what is carried beyond the
    /// last one: -1 of negative sums, otherwise 0.
    template <class Take>
    __device__ __forceinline__ long long carry(bool negative, Take take) const {
        long long carried = 0;
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
#pragma unroll 1
            for (int lane = 0; lane < WARP && lane + i * WARP < WORDS; ++lane) {
                const long long word = __shfl_sync(~0u, words[i], lane);
                const long long v = carried + (negative ? -word : word);
                take(lane + i * WARP, uint32_t(v) & DIGIT);
                carried = v >> WORD_BITS;
            }
        }
        return carried;
    }

    /// The sum, rounded once.
    __device__ __forceinline__ Scaled rounded() const {
        const bool negative = carry(false, [](int, uint32_t) {}) < 0;
        uint32_t below = 0, lower = 0, low = 0;
        unsigned __int128 top = 0;
        int e = 0;
        carry(negative, [&](int at, uint32_t high) {
            // The highest digit and two more are at least 61 bits; whether there are any below is one more.
            if (high) {
                top = (unsigned __int128)high << 2 * WORD_BITS | uint64_t(low) << WORD_BITS | lower | (below != 0);
                e = (at - 2) * WORD_BITS - 1074;
            }
            below |= lower, lower = low, low = high;
        });
        return scaled(uint64_t(top >> 64), uint64_t(top), e, negative);
    }
};

/// Terms on their way to an `Exact` sum, each lane's own: as integers of a scale that its first one sets, as far as
/// they are.
struct Gathered {
    Exact exact;
    __int128 sum = 0;
    int scale = 0, most = -1;  // no term with a higher exponent is added to it

    /// Adds each lane's term; nothing for a NaN or an infinity. By all lanes of a warp.
    __device__ __forceinline__ void add(double v) {
        const int biased = int(uint64_t(__double_as_longlong(v)) >> 52) & 0x7ff;
        // Units of 2^-62 of the first term, and room for 2^32 terms that are 2^32 times larger than it.
        if (most < 0 && biased < 0x7ff && v != 0) most = biased + 32, scale = 62 - (biased - 1022);
        __int128 q = 0;
        const bool held = fixed_quantise(v, scale, q) && biased <= most;
        if (held) sum += q;
        for (uint32_t left = __ballot_sync(~0u, !held && biased < 0x7ff && v != 0); left; left &= left - 1) {
            exact.add(__shfl_sync(~0u, v, __ffs(left) - 1));
        }
    }

    /// The sum of all lanes.
    __device__ __forceinline__ const Exact& all() {
        for (uint32_t left = __ballot_sync(~0u, sum != 0); left; left &= left - 1) {
            const int lane = __ffs(left) - 1;
            const uint64_t low = __shfl_sync(~0u, uint64_t(sum), lane);
            const uint64_t high = __shfl_sync(~0u, uint64_t(sum >> 64), lane);
            exact.add(__int128((unsigned __int128)high << 64 | low), __shfl_sync(~0u, scale, lane));
        }
        sum = 0;
        return exact;
    }
};

/// The sums of a cluster are divided by this (`divided` in src/cpu/update.rs).
struct Quotient {
    int divisor;
    Scaled weight;
    double norm;
    int64_t shift;  // of the sums, where squares would leave the range of f64

    /// `squares(shift)` is the sum of the squares of the sums times 2^-shift, `most()` their highest exponent.
    template <class Squares, class Most>
    __device__ __forceinline__ Quotient(int divisor, const Scaled& weight, Squares squares, Most most)
        : divisor(divisor),
          weight(weight),
          norm(0),
          shift(0) {
        if (divisor != NORM) return;
        double sum = squares(0);
        if (!(LEAST_SQUARES <= sum && sum <= MOST_SQUARES)) {
            shift = most();
            sum = squares(shift);
        }
        norm = __dsqrt_rn(sum);
    }

    /// Whether there is anything to divide by.
    __device__ __forceinline__ bool some() const {
        return divisor == ONE || (divisor == NORM ? norm > 0 : weight.significand > 0);
    }
    __device__ __forceinline__ double divide(const Scaled& sum) const {
        if (divisor == NORM) return __ddiv_rn(sum.value(shift), norm);
        return divisor == ONE ? sum.value(0) : sum.over(weight);
    }
};

/// Whether all values of a row are finite.
template <class T>
__device__ __forceinline__ bool finite(const T* row, int64_t d) {
    bool all = true;
#pragma unroll 4
    for (int64_t c = 0; c < d; ++c) all &= bool(isfinite(wide(row[c])));
    return all;
}

/// Partial sums of columns 32 apart, added up in the order of `striped` in src/fixed.rs.
__device__ __forceinline__ double striped(double partial) {
    for (int step = WARP / 2; step; step /= 2) partial = __dadd_rn(partial, __shfl_xor_sync(~0u, partial, step));
    return partial;
}

/// The square of a difference; nothing if both are the same infinity.
__device__ __forceinline__ double squared(double a, double b) {
    const double t = a == b ? 0 : __dsub_rn(a, b);
    return __dmul_rn(t, t);
}

/// Halves as f64 by their bits alone, since a conversion takes longer than a sum: each is 2^-SCALE of its value. (A
/// subnormal half becomes a subnormal f64, which sums as fast and as exactly.)
template <class T>
struct Small {
    static constexpr bool F16 = std::is_same<T, __half>::value;
    static constexpr int SCALE = F16 ? 1008 : 896;  // how far the exponents' biases are apart

    /// The lower half of a word.
    __device__ __forceinline__ static double low(uint32_t two) { return high(two << 16); }
    __device__ __forceinline__ static double high(uint32_t two) {
        return __hiloint2double((int32_t(two) >> (F16 ? 6 : 3)) & (F16 ? 0x81fffc00 : 0x8fffe000), 0);
    }
};

/// The grid on which the terms of one problem are cut into limbs.
template <class T>
struct Units {
    /// bf16 and f32, whose exponents are the same.
    static constexpr bool SMALL = std::is_same<T, __nv_bfloat16>::value || std::is_same<T, float>::value;
    static constexpr int MANTISSA = sizeof(T) == 4 ? 23 : 7;
    static constexpr int64_t SIGN = 1ll << (8 * sizeof(T) - 1);

    int scale, top;  // every term is below 2^top
    int least;       // what `low` of values that are whole numbers of the first limb's unit is not below
    bool extreme;    // no limbs: their units are no f64, or sums and weights may not be
    bool dirty;      // there may be rows that are not finite

    /// `max_weight` is 1 without weights.
    __device__ Units(double max_abs, double max_weight, int64_t n, bool dirty) : dirty(dirty) {
        scale = fixed_scale(max_abs, n);
        top = 126 - scale - (64 - __clzll(n));
        extreme = top < -900 || top >= 900 || max_weight < 0x1p-900 || max_weight > 0x1p+900;
        if (!SMALL) return;
        // The smallest exponent that such a value has, and its bits. Zero counts as the largest.
        const int exponent = unit(0) + MANTISSA + 127;
        const int64_t bits = exponent > 1 ? int64_t(min(exponent, 256)) << MANTISSA : 0;
        least = extreme ? INT32_MAX : max(bits - 1 - SIGN, -SIGN);
    }

    /// Whether values need no rounding to the first limb's unit.
    template <int EACH>
    __device__ __forceinline__ bool fit(const T (&values)[EACH]) const {
        if constexpr (!SMALL) {
            return false;
        } else if constexpr (sizeof(T) == 4) {
            int low = INT32_MAX;
#pragma unroll
            for (int e = 0; e < EACH; ++e) {
                low = min(low, int((__float_as_uint(values[e]) & 0x7fffffff) - 1 ^ 0x80000000));
            }
            return low >= least;
        } else if constexpr (EACH == 1) {
            const int bits = __bfloat16_as_ushort(values[0]) & 0x7fff;
            return bits == 0 || bits - 1 - SIGN >= least;
        } else {
            uint32_t low = 0x7fff7fff;
#pragma unroll
            for (int e = 0; e < EACH; e += 2) {
                const uint32_t two = *reinterpret_cast<const uint32_t*>(&values[e]);
                low = __vmins2(low, (two & 0x7fff7fff | 0x80008000) - 0x00010001);
            }
            return min(int(low) >> 16, int(low << 16) >> 16) >= least;
        }
    }

    __device__ __forceinline__ int unit(int limb) const { return top - LIMB_BITS * (limb + 1); }
    /// Adding this and taking it away again rounds to the unit.
    __device__ __forceinline__ double rounder(int limb) const {
        return extreme ? 0 : 1.5 * power_of_two(52 + unit(limb));
    }
    /// Takes a limb from what is left of a finite term, and returns it. It is rounded toward zero, so that what is left
    /// keeps the sign of the term.
    __device__ __forceinline__ double take_limb(int limb, double& left) const {
        const double sign_rounder = copysign(rounder(limb), left);
        const double taken = extreme ? 0 : __dadd_rz(left, sign_rounder) - sign_rounder;
        left -= taken;
        return taken;
    }
    /// A limb's sum as an integer of the scale.
    __device__ __forceinline__ __int128 value(int limb, double sum) const {
        if (extreme) return 0;
        return __int128(__double2ll_rn(sum * power_of_two(-unit(limb)))) << (unit(limb) + scale);
    }
};
