// The tensor cores of Ampere and later, and what feeds them.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#include "arch/shared.cuh"

/// Copies the first `bytes` of 16 and zeroes the others.
__device__ __forceinline__ void cp_async_16(uint32_t to, const void* from, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
/// Copies two words, or one.
__device__ __forceinline__ void cp_async_8(uint32_t* to, const uint2* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
__device__ __forceinline__ void cp_async_4(uint32_t* to, const uint32_t* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
/// Waits until at most `N` committed groups are under way.
template <int N>
__device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

/// Four matrices of 8 by 8 halves (`ldmatrix_x4`), transposed.
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&a)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
                 : "r"(address)
                 : "memory");
}

/// acc += a b^T for 16 rows of a, 8 of b and 16 columns.
#define PRODUCT(name, T)                                                                                               \
    __device__ __forceinline__ void mma(float(&acc)[4], const uint32_t(&a)[4], uint32_t b0, uint32_t b1, T) {          \
        asm("mma.sync.aligned.m16n8k16.row.col.f32." #name "." #name                                                   \
            ".f32 "                                                                                                    \
            "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                                          \
            : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])                                                   \
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                                           \
    }
PRODUCT(f16, __half)
PRODUCT(bf16, __nv_bfloat16)
#undef PRODUCT

/// The products of 16 TALL rows and 8 WIDE others over 16 columns: acc[i][j][e] is row 16 i + 8 (e / 2) + lane / 4,
/// column 8 j + 2 (lane % 4) + e % 2. `row(i)` and `other(j)`, for even j, are the lane's addresses for `ldmatrix`.
template <class T, int TALL, int WIDE, class Row, class Other>
__device__ __forceinline__ void multiply_step(float (&acc)[TALL][WIDE][4], Row row, Other other) {
    uint32_t a[TALL][4];
#pragma unroll
    for (int i = 0; i < TALL; ++i) ldmatrix_x4(a[i], row(i));
#pragma unroll
    for (int j = 0; j < WIDE; j += 2) {
        uint32_t b[4];
        ldmatrix_x4(b, other(j));
#pragma unroll
        for (int i = 0; i < TALL; ++i) {
            mma(acc[i][j], a[i], b[0], b[1], T());
            mma(acc[i][j + 1], a[i], b[2], b[3], T());
        }
    }
}

/// The high and the low part of an f32: what tf32 keeps of it, and what it keeps of the rest.
__device__ __forceinline__ uint32_t high(uint32_t v) {
    uint32_t out;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(out) : "r"(v));
    return out;
}
__device__ __forceinline__ uint32_t low(uint32_t v) {
    return high(__float_as_uint(__uint_as_float(v) - __uint_as_float(high(v))));
}
/// The same for 8 columns of tf32.
__device__ __forceinline__ void mma(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, float) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
