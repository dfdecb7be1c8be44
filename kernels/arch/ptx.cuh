// Hopper's own instructions: barriers in shared memory, bulk tensor copies, warpgroup matrix products.
#pragma once
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#include "arch/shared.cuh"

// ---- Loads and stores by address.

__device__ __forceinline__ float2 load_floats(uint32_t from) {
    float2 v;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(from));
    return v;
}
__device__ __forceinline__ float4 load_floats4(uint32_t from) {
    float4 v;
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "r"(from)
                 : "memory");
    return v;
}
__device__ __forceinline__ void store_shared(uint32_t to, float x, float y, float z, float w) {
    asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(to), "f"(x), "f"(y), "f"(z), "f"(w) : "memory");
}

// ---- mbarriers: a phase completes when its arrivals and its announced bytes are in. Waiting is by the phase's parity.

__device__ __forceinline__ void mbarrier_init(uint32_t barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}
/// Makes initialised barriers visible to the copy engine.
__device__ __forceinline__ void mbarrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;");
    asm volatile("fence.proxy.async.shared::cta;");
}
__device__ __forceinline__ void mbarrier_expect_tx(uint32_t barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
/// Arrives at the same barrier of another block of the cluster.
__device__ __forceinline__ void mbarrier_arrive_at(uint32_t barrier, uint32_t block) {
    asm volatile(
        "{\n.reg .b32 there;\n"
        "mapa.shared::cluster.u32 there, %0, %1;\n"
        "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [there];\n}" ::"r"(barrier),
        "r"(block)
        : "memory");
}
/// Waits for all threads of the cluster.
__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
/// Completes the thread's accesses to shared memory before it lets the copy engine or the products at it: an arrival
/// alone overtakes loads under way, and what they read may be overwritten first.
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, uint32_t parity) {
    asm volatile(
        "{\n.reg .pred done;\n"
        "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n}" ::"r"(barrier),
        "r"(parity)
        : "memory");
}

// ---- Named barriers among `threads` threads: who arrives does not wait, who syncs does both.

__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

template <int N>
__device__ __forceinline__ void setmaxnreg_inc() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
__device__ __forceinline__ void setmaxnreg_dec() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

// ---- Bulk copies to shared memory, counted in bytes by `barrier`.

/// The box at (column, row, problem) of a three-dimensional tensor; what lies outside the tensor arrives as zeros.
__device__ __forceinline__ void tma_load(uint32_t to, const CUtensorMap* map, uint32_t barrier, int column, int row,
                                         int problem) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], "
        "[%2];" ::"r"(to),
        "l"(map), "r"(barrier), "r"(column), "r"(row), "r"(problem)
        : "memory");
}
/// The same to the same place of every block of the cluster, and of `barrier`, that is in the mask.
__device__ __forceinline__ void tma_load_multicast(uint32_t to, const CUtensorMap* map, uint32_t barrier, int column,
                                                   int row, int problem, uint16_t blocks) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
        "[%1, {%3, %4, %5}], [%2], %6;" ::"r"(to),
        "l"(map), "r"(barrier), "r"(column), "r"(row), "r"(problem), "h"(blocks)
        : "memory");
}
__device__ __forceinline__ void tma_load_bytes(uint32_t to, const void* from, int bytes, uint32_t barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(barrier)
                 : "memory");
}

// ---- Warpgroup matrix products. Operands in shared memory are rows of 64 halves under the 128-byte swizzle
// (`swizzled_piece<128>`).

/// The descriptor of an operand: address, 1024 bytes between groups of eight rows, 128-byte swizzle.
__device__ __forceinline__ uint64_t matrix_descriptor(uint32_t address) {
    return uint64_t((address & 0x3FFFF) >> 4) | uint64_t(1) << 16 | uint64_t(64) << 32 | uint64_t(1) << 62;
}

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
/// Waits until at most `N` committed groups are under way.
template <int N>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

/// Keeps the compiler from moving uses of accumulators over a fence or a wait.
template <int N>
__device__ __forceinline__ void pin(float (&acc)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+f"(acc[i])::"memory");
}

#define NUMBERS_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define NUMBERS_32 NUMBERS_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NUMBERS_48 NUMBERS_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define NUMBERS_64 NUMBERS_48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define NUMBERS_80 NUMBERS_64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define NUMBERS_96 NUMBERS_80 ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define NUMBERS_112                                                                                                    \
    NUMBERS_96 ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111"
#define NUMBERS_128                                                                                                    \
    NUMBERS_112 ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define EIGHT(acc, i)                                                                                                  \
    "+f"(acc[i]), "+f"(acc[i + 1]), "+f"(acc[i + 2]), "+f"(acc[i + 3]), "+f"(acc[i + 4]), "+f"(acc[i + 5]),            \
        "+f"(acc[i + 6]), "+f"(acc[i + 7])
#define SCORES_16(acc) EIGHT(acc, 0), EIGHT(acc, 8)
#define SCORES_32(acc) SCORES_16(acc), EIGHT(acc, 16), EIGHT(acc, 24)
#define SCORES_48(acc) SCORES_32(acc), EIGHT(acc, 32), EIGHT(acc, 40)
#define SCORES_64(acc) SCORES_48(acc), EIGHT(acc, 48), EIGHT(acc, 56)
#define SCORES_128(acc)                                                                                                \
    SCORES_64(acc), EIGHT(acc, 64), EIGHT(acc, 72), EIGHT(acc, 80), EIGHT(acc, 88), EIGHT(acc, 96), EIGHT(acc, 104),   \
        EIGHT(acc, 112), EIGHT(acc, 120)
#define PRODUCT(name, T, type, width, scores, operands, adds)                                                          \
    template <>                                                                                                        \
    __device__ __forceinline__ void name<T>(float(&acc)[scores], const uint32_t(&a)[4], uint64_t b) {                  \
        asm volatile("wgmma.mma_async.sync.aligned.m64n" #width "k16.f32." type "." type " {" NUMBERS_##scores         \
                     "}, " operands ", " #adds ", 1, 1, 0;"                                                            \
                     : SCORES_##scores(acc)                                                                            \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                            \
    }
#define PRODUCTS(name, T, type, adds)                                                                                  \
    PRODUCT(name, T, type, 32, 16, "{%16, %17, %18, %19}, %20", adds)                                                  \
    PRODUCT(name, T, type, 64, 32, "{%32, %33, %34, %35}, %36", adds)                                                  \
    PRODUCT(name, T, type, 96, 48, "{%48, %49, %50, %51}, %52", adds)                                                  \
    PRODUCT(name, T, type, 128, 64, "{%64, %65, %66, %67}, %68", adds)

/// acc += a b^T for 64 rows in registers and 2 N rows in shared memory, 16 columns of each.
template <class T, int N>
__device__ __forceinline__ void wgmma(float (&acc)[N], const uint32_t (&a)[4], uint64_t b);
PRODUCTS(wgmma, __half, "f16", 1)
PRODUCTS(wgmma, __nv_bfloat16, "bf16", 1)

/// acc = a b^T of the same.
template <class T, int N>
__device__ __forceinline__ void wgmma_first(float (&acc)[N], const uint32_t (&a)[4], uint64_t b);
PRODUCTS(wgmma_first, __half, "f16", 0)
#undef PRODUCTS
#undef PRODUCT

#define PRODUCT(T, type, width, scores, operands)                                                                      \
    template <>                                                                                                        \
    __device__ __forceinline__ void wgmma_shared<T>(float(&acc)[scores], uint64_t a, uint64_t b) {                     \
        asm volatile("wgmma.mma_async.sync.aligned.m64n" #width "k16.f32." type "." type " {" NUMBERS_##scores         \
                     "}, " operands ", 1, 1, 1, 0, 0;"                                                                 \
                     : SCORES_##scores(acc)                                                                            \
                     : "l"(a), "l"(b));                                                                                \
    }
#define PRODUCTS(T, type)                                                                                              \
    PRODUCT(T, type, 128, 64, "%64, %65")                                                                              \
    PRODUCT(T, type, 256, 128, "%128, %129")

/// The same with the 64 rows in shared memory, too.
template <class T, int N>
__device__ __forceinline__ void wgmma_shared(float (&acc)[N], uint64_t a, uint64_t b);
PRODUCTS(__half, "f16")
PRODUCTS(__nv_bfloat16, "bf16")
#undef PRODUCTS
#undef PRODUCT
