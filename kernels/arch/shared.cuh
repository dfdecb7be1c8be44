// Shared memory by its 32-bit addresses, and how rows of halves lie there for the tensor cores.
#pragma once
#include <cstdint>

__device__ __forceinline__ uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

/// The place of a 16-byte piece in a row of BYTES bytes: the XOR swizzle puts the same piece of eight rows, which
/// `ldmatrix` reads at a time, into different banks. With rows of 128 bytes it is the copy engine's 128-byte swizzle.
template <int BYTES>
__device__ __forceinline__ int swizzled_piece(int row, int piece) {
    static_assert(BYTES == 64 || BYTES % 128 == 0, "eight rows' pieces have to spread over all banks");
    return (piece ^ (BYTES == 64 ? row >> 1 & 3 : row & 7)) << 4;
}
/// The same from the first row on.
template <int BYTES>
__device__ __forceinline__ int swizzled(int row, int piece) {
    return row * BYTES + swizzled_piece<BYTES>(row, piece);
}

/// Four matrices of 8 by 8 halves, a row of each from the address that a lane gives.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&a)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
                 : "r"(address)
                 : "memory");
}
