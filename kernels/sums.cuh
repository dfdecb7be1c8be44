// How the terms of a sum that does not depend on their order are cut into f64 "limbs", and what the sum is divided by.
#pragma once
#include "common.cuh"

/// Bits of a limb's terms: with their sign and 10 more for their sum they fit the 53 of an f64.
constexpr int LIMB_BITS = 42;

/// What a sum is divided by: the weight of its cluster, the norm of the sums, or nothing.
enum Divisor : int { WEIGHT = 0, NORM = 1, ONE = 2 };

/// Where the terms of a fit come from (`Terms` in src/ops.rs).
struct Terms {
    const double *factor, *largest, *heaviest;
    const uint32_t* first_bad;
};

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

/// How the terms of one problem are cut.
template <class T>
struct Units {
    /// bf16 and f32, whose exponents are the same.
    static constexpr bool SMALL = std::is_same<T, __nv_bfloat16>::value || std::is_same<T, float>::value;
    static constexpr int MANTISSA = sizeof(T) == 4 ? 23 : 7;
    static constexpr int64_t SIGN = 1ll << (8 * sizeof(T) - 1);

    int scale, top;  // every term is below 2^top
    int least;       // what `low` of values that are whole numbers of the first limb's unit is not below
    bool extreme;    // no limbs: their units are no f64
    bool dirty;      // there may be terms that are no numbers

    __device__ Units(double largest, int64_t n, bool dirty) : dirty(dirty) {
        scale = fixed_scale(largest, n);
        top = 126 - scale - (64 - __clzll(n));
        extreme = top < -900 || top >= 900;
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
    /// A limb's sum as an integer of the scale.
    __device__ __forceinline__ __int128 value(int limb, double sum) const {
        if (extreme) return 0;
        return __int128(__double2ll_rn(sum * power_of_two(-unit(limb)))) << (unit(limb) + scale);
    }
};
