// Merges what cq_decode found with the tokens kept in full precision: one softmax over all.
//
// A block takes one (batch row, kv head) and up to ROWS query rows. Its warps attend to the sinks
// and the recent tokens, each to every WARPS-th, and then share the parts. Sinks are the columns
// [first, first + sinks) as far as they are coded; recent tokens are [coded, total), kept at place
// column % capacity.
#include "../common.cuh"

constexpr int RS = ROWS, D = VALUE_DIM, KD = KEY_DIM;
constexpr int KN = (KD / 2 + 31) / 32, VN = (D / 2 + 31) / 32;  // channel pairs a lane takes
constexpr float NEVER = -1e30f;

DEVICE float2 load_pair(const element* at) {
#if DTYPE == 2
  return *reinterpret_cast<const float2*>(at);
#elif DTYPE == 1
  return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(at));
#else
  return __half22float2(*reinterpret_cast<const __half2*>(at));
#endif
}

DEVICE float warp_sum(float x) {
  for (int bit = 16; bit; bit >>= 1) x += __shfl_xor_sync(~0u, x, bit);
  return x;
}

// query, out: element strides (batch, head, token). recent and sink keys and values:
// [batch, kv_heads, capacity or sinks, dim] with strides (batch, head), tokens `dim` apart.
// value_channels [kv_heads, D]: the model channel of each channel of part_out.
extern "C" __global__ void __launch_bounds__(WARPS * 32, 1)
cq_finish(const float* __restrict__ part_out, const float2* __restrict__ part_ml,
          const element* __restrict__ query, i64 query_b, i64 query_h, i64 query_l,
          const element* __restrict__ recent_keys, const element* __restrict__ recent_values,
          i64 recent_kb, i64 recent_kh, i64 recent_vb, i64 recent_vh, int capacity,
          const element* __restrict__ sink_keys, const element* __restrict__ sink_values,
          i64 sink_kb, i64 sink_kh, i64 sink_vb, i64 sink_vh,
          const int* __restrict__ value_channels, const int* __restrict__ first,
          const int* __restrict__ coded, const int* __restrict__ total,
          const u8* __restrict__ mask, i64 mask_stride, element* __restrict__ out, i64 out_b,
          i64 out_h, i64 out_l, int kv_heads, int queries_per_head, int query_length, int splits,
          int rows_padded, int sinks, int sliding, float scale, float cap) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int b = blockIdx.x / kv_heads, head = blockIdx.x % kv_heads, row0 = blockIdx.y * RS;
  const int rows = min(RS, queries_per_head * query_length - row0);
  constexpr int PASSES = (RS + WARPS - 1) / WARPS;
  __shared__ __align__(8) float merged[RS][WARPS][D];
  __shared__ float tops[RS][WARPS], sums[RS][WARPS];
  __shared__ float coded_out[WARPS][PASSES][D], coded_top[WARPS][PASSES], coded_sum[WARPS][PASSES];

  allow_next_kernel();
  int2 channels[VN];  // of the lane's pairs
#pragma unroll
  for (int i = 0; i < VN; i++)
    channels[i] = lane + 32 * i < D / 2
        ? *reinterpret_cast<const int2*>(value_channels + head * D + 2 * (lane + 32 * i))
        : make_int2(0, 0);
  wait_for_previous_kernel();
  const int begin = first[b], code_end = coded[b], end = total[b];
  const int sink_count = sink_keys != nullptr ? max(0, min(sinks, code_end - begin)) : 0;
  const int dense = sink_count + end - code_end;
  // Parts: a warp takes one row and every STRIDE-th part of it, CHUNK of them in flight.
  constexpr int STRIDE = WARPS / RS > 0 ? WARPS / RS : 1, CHUNK = 4;
  const i64 parts = (static_cast<i64>(b) * kv_heads + head) * splits;
#pragma unroll
  for (int pass = 0; pass < PASSES; pass++) {
    const int row = warp % RS + pass * WARPS, index = row0 + row;
    float high = NEVER, l = 0.f;
    float2 extra[VN];
#pragma unroll
    for (int i = 0; i < VN; i++) extra[i] = make_float2(0.f, 0.f);
    for (int s0 = warp / RS; s0 < splits; s0 += STRIDE * CHUNK) {
      float2 ml[CHUNK], x[CHUNK][VN];
#pragma unroll
      for (int c = 0; c < CHUNK; c++) {
        i64 at = (parts + min(s0 + c * STRIDE, splits - 1)) * rows_padded + index;
        ml[c] = part_ml[at];
        if (s0 + c * STRIDE >= splits) ml[c].y = 0.f;
#pragma unroll
        for (int i = 0; i < VN; i++)
          if (lane + 32 * i < D / 2)
            x[c][i] = reinterpret_cast<const float2*>(part_out + at * D)[lane + 32 * i];
      }
      float top = high;
#pragma unroll
      for (int c = 0; c < CHUNK; c++)
        if (ml[c].y > 0.f) top = fmaxf(top, ml[c].x);
      float keep = exp2_fast(high - top);
      high = top, l *= keep;
#pragma unroll
      for (int i = 0; i < VN; i++) extra[i].x *= keep, extra[i].y *= keep;
#pragma unroll
      for (int c = 0; c < CHUNK; c++) {
        // A part without tokens holds whatever was there before.
        if (!(ml[c].y > 0.f)) continue;
        float f = exp2_fast(ml[c].x - high);
        l += ml[c].y * f;
#pragma unroll
        for (int i = 0; i < VN; i++)
          if (lane + 32 * i < D / 2)
            extra[i].x += f * x[c][i].x, extra[i].y += f * x[c][i].y;
      }
    }
#pragma unroll
    for (int i = 0; i < VN; i++)
      if (lane + 32 * i < D / 2) {
        coded_out[warp][pass][channels[i].x] = extra[i].x;
        coded_out[warp][pass][channels[i].y] = extra[i].y;
      }
    if (lane == 0) coded_top[warp][pass] = high, coded_sum[warp][pass] = l;
  }

  const int oldest_query = end - query_length;
  float2 q[RS][KN];
  int row_begin[RS], row_end[RS];
#pragma unroll
  for (int row = 0; row < RS; row++) {
    int index = min(row0 + row, queries_per_head * query_length - 1), l = index % query_length;
    const element* at = query + b * query_b +
        (head * queries_per_head + index / query_length) * query_h + l * query_l;
#pragma unroll
    for (int i = 0; i < KN; i++) {
      int pair = lane + 32 * i;
      q[row][i] = dense > 0 && pair < KD / 2 ? load_pair(at + 2 * pair) : make_float2(0.f, 0.f);
      q[row][i].x *= scale, q[row][i].y *= scale;
    }
    row_end[row] = oldest_query + l + 1;
    row_begin[row] = sliding > 0 ? max(begin, row_end[row] - sliding) : begin;
  }

  float top[RS], sum[RS];
  float2 o[RS][VN];
#pragma unroll
  for (int row = 0; row < RS; row++) {
    top[row] = NEVER, sum[row] = 0.f;
#pragma unroll
    for (int i = 0; i < VN; i++) o[row][i] = make_float2(0.f, 0.f);
  }
  for (int index = warp; index < dense; index += WARPS) {
    const element *key, *value;
    int column;
    if (index < sink_count) {
      column = begin + index;
      key = sink_keys + b * sink_kb + head * sink_kh + static_cast<i64>(index) * KD;
      value = sink_values + b * sink_vb + head * sink_vh + static_cast<i64>(index) * D;
    } else {
      column = code_end + index - sink_count;
      i64 place = column % capacity;
      key = recent_keys + b * recent_kb + head * recent_kh + place * KD;
      value = recent_values + b * recent_vb + head * recent_vh + place * D;
    }
    if (column < begin) continue;
#if HAS_MASK
    if (mask[b * mask_stride + column] == 0) continue;
#endif
    float2 k[KN], v[VN];
#pragma unroll
    for (int i = 0; i < KN; i++)
      k[i] = lane + 32 * i < KD / 2 ? load_pair(key + 2 * (lane + 32 * i)) : make_float2(0.f, 0.f);
#pragma unroll
    for (int i = 0; i < VN; i++)
      v[i] = lane + 32 * i < D / 2 ? load_pair(value + 2 * (lane + 32 * i)) : make_float2(0.f, 0.f);
#pragma unroll
    for (int row = 0; row < RS; row++) {
      float z = 0.f;
#pragma unroll
      for (int i = 0; i < KN; i++) z += q[row][i].x * k[i].x + q[row][i].y * k[i].y;
      z = warp_sum(z);
#if SOFTCAP
      z = cap * tanhf(z);
#endif
      if (column < row_begin[row] || column >= row_end[row]) continue;
      float high = fmaxf(top[row], z), keep = exp2_fast(top[row] - high), p = exp2_fast(z - high);
      top[row] = high, sum[row] = sum[row] * keep + p;
#pragma unroll
      for (int i = 0; i < VN; i++) {
        o[row][i].x = o[row][i].x * keep + p * v[i].x;
        o[row][i].y = o[row][i].y * keep + p * v[i].y;
      }
    }
  }

#pragma unroll
  for (int row = 0; row < RS; row++) {
    if (lane == 0) tops[row][warp] = top[row], sums[row][warp] = sum[row];
    if (dense > 0) {
#pragma unroll
      for (int i = 0; i < VN; i++)
        if (lane + 32 * i < D / 2)
          *reinterpret_cast<float2*>(&merged[row][warp][2 * (lane + 32 * i)]) = o[row][i];
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < rows * D; i += WARPS * 32) {
    const int row = i / D, channel = i % D, index = row0 + row, pass = row / WARPS;
    float high = coded_top[row % WARPS][pass], l = 0.f, x = 0.f;
    for (int w = 0; w < WARPS; w++) high = fmaxf(high, tops[row][w]);
    for (int w = 0; w < (dense > 0 ? WARPS : 0); w++) {
      float f = exp2_fast(tops[row][w] - high);
      l += sums[row][w] * f, x += merged[row][w][channel] * f;
    }
    for (int w = row % WARPS; w < (RS < WARPS ? STRIDE * RS : WARPS); w += RS) {
      float f = exp2_fast(coded_top[w][pass] - high);
      l += coded_sum[w][pass] * f, x += coded_out[w][pass][channel] * f;
    }
    // A row that may see nothing gets zeros, as SDPA's kernels give.
    out[b * out_b + (head * queries_per_head + index / query_length) * out_h +
        (index % query_length) * out_l + channel] = from_float(l > 0.f ? x / l : 0.f);
  }
}
