// Shared by all kernels: element types, tensor-core and fast-math wrappers, row geometry.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#define DEVICE __device__ __forceinline__

// DTYPE: the model's element type. 0 float16, 1 bfloat16, 2 float32.
#ifndef DTYPE
#define DTYPE 0
#endif
#if DTYPE == 0
typedef __half element;
DEVICE float to_float(element x) { return __half2float(x); }
DEVICE element from_float(float x) { return __float2half_rn(x); }
#elif DTYPE == 1
typedef __nv_bfloat16 element;
DEVICE float to_float(element x) { return __bfloat162float(x); }
DEVICE element from_float(float x) { return __float2bfloat16_rn(x); }
#else
typedef float element;
DEVICE float to_float(element x) { return x; }
DEVICE element from_float(float x) { return x; }
#endif

DEVICE __half2 as_half2(u32 x) { return *reinterpret_cast<__half2*>(&x); }
DEVICE u32 as_u32(__half2 x) { return *reinterpret_cast<u32*>(&x); }
DEVICE u32 pack_half2(float lo, float hi) { return as_u32(__floats2half2_rn(lo, hi)); }

DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// c += a b: a is 16 x 16 (row r = lane / 4 in a0, a2 and r + 8 in a1, a3; columns 2t, 2t + 1 in
// a0, a1 and 2t + 8, 2t + 9 in a2, a3, t = lane % 4), b is 16 x 8 (column r), c is 16 x 8.
DEVICE void mma_16816(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},"
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// The same with k = 8: a0 is row r, a1 row r + 8, columns 2t, 2t + 1.
DEVICE void mma_1688(float (&c)[4], u32 a0, u32 a1, u32 b0) {
  asm(
      "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5},{%6},{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(b0));
}

// Codes of 6 bits lie in words of three bytes: the first three codes in the lower bits of one byte each,
// the fourth in the upper bits of all three. A tile has the first two bytes of all words, then the
// third ones. Two full blocks of 32 words lie in turns, so that one load brings a lane's words of both.
DEVICE int place_of_6(int word, int words) {
  if ((word | 63) >= words) return word;
  return (word & ~63) | (word & 31) << 1 | (word >> 5 & 1);
}

DEVICE void prefetch(const void* global) {
  asm volatile("prefetch.global.L1 [%0];" ::"l"(global));
}

DEVICE u32 shared_address(const void* shared) {
  return static_cast<u32>(__cvta_generic_to_shared(shared));
}

DEVICE void copy_async_16(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;"
               ::"r"(shared_address(shared)), "l"(global) : "memory");
}
DEVICE void copy_async_wait() {
  asm volatile("cp.async.commit_group;\ncp.async.wait_group 0;" ::: "memory");
}

// Four matrices of 8 x 8, transposed: lane 8 m + k gives the address of row k of matrix m, and lane
// (r, t) has rows 2t, 2t + 1 of column r. Of memory that does not change: the compiler may reorder it.
DEVICE void load_matrices(u32 (&x)[4], u32 address) {
  asm("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
      : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
      : "r"(address));
}

// Bulk copies by the asynchronous unit, which take no thread's time. `barrier` is eight bytes of
// shared memory that one thread prepares; after a __syncthreads() one thread starts the copies (their
// bytes in all given first), and all may wait.
#if __CUDA_ARCH__ >= 900
DEVICE void bulk_prepare(u64* barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;\nfence.mbarrier_init.release.cluster;"
               ::"r"(shared_address(barrier)) : "memory");
}
DEVICE void bulk_expect(u64* barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
               ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}
DEVICE void bulk_copy(void* shared, const void* global, u32 bytes, u64* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
      ::"r"(shared_address(shared)), "l"(global), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}
DEVICE void bulk_wait(u64* barrier) {
  asm volatile(
      "{\n.reg .pred done;\nAGAIN:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], 0;\n@!done bra AGAIN;\n}"
      ::"r"(shared_address(barrier)) : "memory");
}
#endif

// Programmatic dependent launch: the next kernel of the stream may start its preparations while this
// one runs, and waits before it reads what this one writes. Nothing happens unless the launch asks.
DEVICE void allow_next_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
DEVICE void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// cos and sin of a phase in turns / 2^32, by the fast units: absolute error below 1e-6, well under
// the rounding to fp16 that follows.
DEVICE float2 phase_turn(u32 phase) {
  float angle = static_cast<float>(static_cast<int>(phase)) * 1.4629180792671596e-9f;
  float2 out;
  __sincosf(angle, &out.y, &out.x);
  return out;
}

// The same of position * step / 2^64 turns: the integer product wraps, so the angle is exact at any
// position.
DEVICE float2 turn_fast(int position, u64 step) {
  u64 phase = static_cast<u64>(static_cast<i64>(position)) * step;
  return phase_turn(static_cast<u32>(phase >> 32));
}
