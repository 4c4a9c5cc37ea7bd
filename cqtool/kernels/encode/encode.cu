// Encoding: the nearest centroid of every group of a key or value vector, into tiles of 16 tokens.
//
// A warp takes 16 * MTILES vectors of one kv head and goes through groups. The tensor cores give
// x.c - |c|^2/2 (the largest is the nearest) for 16 vectors and 8 centroids at a time, and each lane
// keeps a running maximum of a word that carries the score above and 255 - code below:
//
//   The tables are scaled by powers of two so that scores lie within 62 of zero, and the
//   accumulators start from 192 more. Then every score has the exponent of 128..256 and word
//   256 * bits(score) + 255 - code loses none of it, orders like it, and prefers the lower code on
//   a tie: one multiply-add and one maximum per distance, in different pipes.
//
// A vector too long for that (several times the longest centroid) takes a slower exact loop; the
// choice is the row's own, so codes do not depend on what else is in the batch.
//
// Column 2t + i of the j-th block of 8 centroids is code 8j + 4i + t: of equal scores the lower
// code has the lower (j, i), then the lower lane.
//
// Defines: HEAD_DIM, CHANNELS, BITS, DTYPE, KIND_KEY, FLAT (rows are (batch, token) pairs in any
// order instead of whole tiles), MTILES (4, or 1 with FLAT), VECTOR (channels of a lane are
// neighbours in memory), HAS_METRIC, UNROTATE, HAS_GAIN.
#include "common.cuh"

#ifndef EMBED_SHIFTS
// Of the four words a tensor-core instruction gives a lane, how many are made by a shift (the
// maximum's pipe) rather than by a multiplication. With three-way maxima that pipe has room.
#if __CUDA_ARCH__ >= 900
#define EMBED_SHIFTS 1
#else
#define EMBED_SHIFTS 0
#endif
#endif

constexpr int GROUPS = HEAD_DIM / CHANNELS;
constexpr int UNITS = GROUPS / 2;
constexpr int TABLE = BITS < 8 ? 1 << BITS : 256;  // centroids at a time
constexpr int PASSES = (1 << BITS) / TABLE;
constexpr int TILE = 16;
constexpr int TILE_BYTES = TILE * GROUPS * BITS / 8;
constexpr int MAX_WARPS = 8;
// Lanes of a quad that hold a group's channels once. The next ones hold the rounding errors.
constexpr int LANES = CHANNELS / 2;
// Vectors that are not exact in float16 are given as a sum of two.
constexpr bool SPLIT = UNROTATE || HAS_METRIC || HAS_GAIN || DTYPE == 2;
constexpr bool WIDE = SPLIT && CHANNELS == 8;  // the second part takes 8 more channels
constexpr int FRAGMENTS = TABLE;               // 16-byte pieces of a table's centroids
constexpr int OFFSETS = TABLE / 2;             // 8-byte pieces of its offsets, doubled when staged
constexpr int IMAGE = FRAGMENTS + OFFSETS / 2;
constexpr int STAGE = FRAGMENTS + OFFSETS;
constexpr float HALF_MAX = 65504.0f;

static_assert(MTILES == 4 || (FLAT && MTILES == 1), "whole tiles are taken by fours");
static_assert(GROUPS % 2 == 0, "groups come in pairs");

struct FlatRow {
  i64 offset;
  int position;
};

struct Place {
  u8* tile;  // null where nothing is to be written
  int token;
};

DEVICE void copy_async_8(void* shared, const void* global) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;"
               ::"r"(shared_address(shared)), "l"(global) : "memory");
}

// One table (TABLE centroids of a group) into shared memory; offsets go to both rows of a fragment.
DEVICE void stage_table(uint4* stage, const uint4* image) {
  for (int i = threadIdx.x; i < FRAGMENTS; i += blockDim.x) copy_async_16(stage + i, image + i);
  const uint2* offsets = reinterpret_cast<const uint2*>(image + FRAGMENTS);
  uint2* copies = reinterpret_cast<uint2*>(stage + FRAGMENTS);
  for (int i = threadIdx.x; i < 2 * OFFSETS; i += blockDim.x)
    copy_async_8(copies + i, offsets + i / 2);
}

struct Rows16 {
  u32 hi[2], lo[2];  // rows r and r + 8, two channels each
};

// scores = 16 vectors times 8 centroids plus offset. Not volatile: the compiler may reorder it.
DEVICE void distances(float (&d)[4], const Rows16& a, u32 b, const float4& offset) {
  if constexpr (WIDE) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%8},"
        "{%9,%10,%11,%12};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a.hi[0]), "r"(a.hi[1]), "r"(a.lo[0]), "r"(a.lo[1]), "r"(b), "f"(offset.x),
          "f"(offset.y), "f"(offset.z), "f"(offset.w));
  } else {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5},{%6},"
        "{%7,%8,%9,%10};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a.hi[0]), "r"(a.hi[1]), "r"(b), "f"(offset.x), "f"(offset.y), "f"(offset.z),
          "f"(offset.w));
  }
}

// `radix` is 256, but the compiler must not know: it would shift, which competes with the maximum.
DEVICE u32 embed(float score, u32 radix, u32 rank, bool shift) {
  u32 bits = __float_as_uint(score);
  if (shift) return (bits << 8) + rank;
  u32 word;
  asm("mad.lo.u32 %0, %1, %2, %3;" : "=r"(word) : "r"(bits), "r"(radix), "r"(rank));
  return word;
}

// A float's bits as an unsigned integer that orders like the float.
DEVICE u32 ordered(float x) {
  u32 bits = __float_as_uint(x);
  return bits ^ (static_cast<u32>(static_cast<int>(bits) >> 31) | 0x80000000u);
}

DEVICE u32 component(const uint4& v, int k) { return k == 0 ? v.x : k == 1 ? v.y : k == 2 ? v.z : v.w; }

DEVICE float2 load_two(const element* row, int a, int b) {
#if VECTOR && DTYPE == 0
  return __half22float2(*reinterpret_cast<const __half2*>(row + a));
#elif VECTOR && DTYPE == 1
  u32 word = *reinterpret_cast<const u32*>(row + a);
  return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u));
#elif VECTOR
  return *reinterpret_cast<const float2*>(row + a);
#else
  return make_float2(to_float(row[a]), to_float(row[b]));
#endif
}

// A map entry: model channel, the channel it turns with, its pair, and 1 for the pair's first
// channel, 2 for its second, 0 for a channel that is not turned.
DEVICE int source_of(int entry) { return entry & 255; }
DEVICE int partner_of(int entry) { return (entry >> 8) & 255; }
DEVICE int pair_of(int entry) { return (entry >> 16) & 255; }
DEVICE int turn_of(int entry) { return entry >> 24; }

DEVICE float2 load_partners(const element* row, int2 entry) {
#if VECTOR
  int a = partner_of(entry.x);
  float2 v = load_two(row, a & ~1, 0);
  return a & 1 ? make_float2(v.y, v.x) : v;
#else
  return load_two(row, partner_of(entry.x), partner_of(entry.y));
#endif
}

// `sign` is 1 for a pair's first channel and -1 for its second. A step of zero leaves x as it is.
DEVICE float unturn(float x, float partner, int position, u64 step, float sign) {
  float2 c = turn_fast(position, step);
  return x * c.x + partner * (c.y * sign);
}

// The larger one; NaN if either is.
DEVICE float max_nan(float a, float b) {
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}

// Two floats to float16, saturated; a NaN becomes the most negative number.
DEVICE u32 pack_saturated(float a, float b) {
  const __half2 top = __float2half2_rn(HALF_MAX), bottom = __float2half2_rn(-HALF_MAX);
  return as_u32(__hmin2(__hmax2(as_half2(pack_half2(a, b)), bottom), top));
}

// The rest of a byte belongs to tokens that other threads may be writing: change our bits only, which
// lie in one aligned word.
DEVICE void put_bits(u8* byte, u32 bits, u32 mask) {
  size_t address = reinterpret_cast<size_t>(byte);
  u32* word = reinterpret_cast<u32*>(address & ~static_cast<size_t>(3));
  int shift = static_cast<int>(address & 3) * 8;
  u32 changed = ((__ldcg(word) >> shift) ^ bits) & mask;
  if (changed) atomicXor(word, changed << shift);
}

// The fourth code of a word of 6-bit codes: two bits above those of each other code.
DEVICE u32 spread_6(u32 code) { return (code & 3) << 6 | (code & 12) << 12 | (code & 48) << 18; }

// Writes one token's code; `place` is the group's place in kernel order.
DEVICE void put_code(const Place& at, int place, u32 code) {
  if (at.tile == nullptr) return;
  int word, byte;
  if (KIND_KEY) {
    int unit = place / 2, lanes = min(4, UNITS - unit / 4 * 4);
    word = 32 * (unit / 4) + (at.token % 8) * lanes + unit % 4;
    byte = at.token / 8 * 2 + place % 2;
  } else {
    word = 4 * place + at.token % 8 / 2;
    byte = at.token % 2 + at.token / 8 * 2;
  }
  if (BITS == 6) {
    const int own = place_of_6(word, 4 * GROUPS);
    u8 *low = at.tile + 2 * own, *third = at.tile + 8 * GROUPS + own;
    if (byte < 3) {
      put_bits(byte < 2 ? low + byte : third, code, 0x3f);
    } else {
      put_bits(low, spread_6(code), 0xc0c0);
      put_bits(third, spread_6(code) >> 16, 0xc0);
    }
    return;
  }
  at.tile[4 * word + byte] = static_cast<u8>(code);
  if (BITS > 8) put_bits(at.tile + TILE * GROUPS + word, code >> 8 << 2 * byte, 3u << 2 * byte);
}

// Writes the codes of a whole word that this thread alone owns; bit k of `valid` says whether there
// is a k-th one. Each code is in the low BITS of its 16 bits.
DEVICE void put_word(u8* tile, int word, u32 even, u32 odd, u32 valid) {
  // even: codes of bytes 0 and 2, odd: of bytes 1 and 3.
  u32 codes = __byte_perm(even, odd, 0x6240);
  if (BITS == 6) {
    const int own = place_of_6(word, 4 * GROUPS);
    u16* low = reinterpret_cast<u16*>(tile) + own;
    u8* third = tile + 8 * GROUPS + own;
    u32 three = (codes & 0x3f3f3f) | spread_6(codes >> 24);
    if (valid != 15) {
      u32 mask = (valid & 1) * 0x3f | (valid >> 1 & 1) * 0x3f00 | (valid >> 2 & 1) * 0x3f0000 |
          (valid >> 3) * 0xc0c0c0;
      three = (three & mask) | ((*low | *third << 16) & ~mask);
    }
    *low = static_cast<u16>(three), *third = static_cast<u8>(three >> 16);
    return;
  }
  u8* at = tile + 4 * word;
  if (valid == 15) {
    *reinterpret_cast<u32*>(at) = codes;
  } else {
#pragma unroll
    for (int k = 0; k < 4; k++)
      if (valid >> k & 1) at[k] = static_cast<u8>(codes >> 8 * k);
  }
  if (BITS > 8 && valid) {
    u32 upper = (even >> 8 & 3) | (odd >> 8 & 3) << 2 | (even >> 24 & 3) << 4 | (odd >> 24 & 3) << 6;
    u32 mask = (valid & 1) * 3 | (valid >> 1 & 1) * 12 | (valid >> 2 & 1) * 48 | (valid >> 3) * 192;
    u8* byte = tile + TILE * GROUPS + word;
    *byte = static_cast<u8>(valid == 15 ? upper : (*byte & ~mask) | (upper & mask));
  }
}

extern "C" __global__ void __launch_bounds__(32 * MAX_WARPS, 2) cq_encode(
    const element* __restrict__ x,         // [batch, kv_heads, tokens, HEAD_DIM]
    i64 x_batch, i64 x_head, i64 x_token,  // its strides in elements
    const int* __restrict__ column,        // [batch]: column of the first token, negative: skip
    u8* storage, i64 page_bytes, i64 head_bytes, int tiles_per_page,
    const int* __restrict__ block_table, int max_pages,  // [batch, max_pages] or null
    const uint4* __restrict__ image,                     // [kv_heads, GROUPS, PASSES, IMAGE]
    const float4* __restrict__ scaling,                  // [kv_heads, GROUPS]: scale, limit^2, -, -
    const int2* __restrict__ maps,                       // [kv_heads, HEAD_DIM / 2]
    const float* __restrict__ metric,                    // [kv_heads, GROUPS, CHANNELS, CHANNELS]
    const u64* __restrict__ steps, i64 steps_head,       // [(kv_heads,) HEAD_DIM / 2]
    const int* __restrict__ position, float inverse_scale,
    __half* gains, i64 gain_page, i64 gain_head,  // [pages, kv_heads, 16 * tiles_per_page]
    int batch, int tokens, int span, u32 radix) {
  __shared__ uint4 stages[2][STAGE];
  const int lane = threadIdx.x & 31, r = lane >> 2, t = lane & 3;
  const int head = blockIdx.y;
  const int first = blockIdx.z * span, last = min(first + span, GROUPS);
  const i64 item = static_cast<i64>(blockIdx.x) * (blockDim.x >> 5) + (threadIdx.x >> 5);
  const uint4* tables = image + static_cast<i64>(head * GROUPS + first) * PASSES * IMAGE;
  stage_table(stages[0], tables);

  // Where a column lies. Columns past the end and pages below zero are not written.
  const int capacity = block_table ? max_pages * tiles_per_page : tiles_per_page;
  auto locate = [&](int b, int tile, i64& page, int& inside) {
    if (tile < 0 || tile >= capacity) return false;
    page = b, inside = tile;
    if (block_table) {
      page = block_table[static_cast<i64>(b) * max_pages + tile / tiles_per_page];
      inside = tile % tiles_per_page;
    }
    return page >= 0;
  };
  auto tile_at = [&](i64 page, int inside) {
    return storage + page * page_bytes + head * head_bytes + static_cast<i64>(inside) * TILE_BYTES;
  };

  u32 valid = 0;  // bit 2m + h: row r + 8h of the m-th 16 rows
  bool active;
#if FLAT
  // What would take too many registers: where each of the warp's vectors is, and its position.
  __shared__ FlatRow flat_rows[MAX_WARPS][MTILES * 16];
  FlatRow* mine = flat_rows[threadIdx.x >> 5];
  const i64 rows = static_cast<i64>(batch) * tokens;
  auto row_of = [&](int m, int h, int& b, int& n) {
    i64 row = (item * MTILES + m) * 16 + r + 8 * h;
    if (row >= rows) return false;
    b = static_cast<int>(row / tokens), n = static_cast<int>(row - static_cast<i64>(b) * tokens);
    return column[b] >= 0;
  };
#pragma unroll
  for (int m = 0; m < MTILES; m++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      int b = 0, n = 0;
      if (row_of(m, h, b, n)) valid |= 1u << (2 * m + h);
      if (t == 0) {
        mine[16 * m + 8 * h + r].offset = b * x_batch + head * x_head + n * x_token;
        mine[16 * m + 8 * h + r].position = UNROTATE ? position[b] + n : 0;
      }
    }
  __syncwarp();
  active = item * MTILES * 16 < rows;
  auto row_pointer = [&](int m, int h) { return x + mine[16 * m + 8 * h + r].offset; };
  [[maybe_unused]] auto row_position = [&](int m, int h) {
    return mine[16 * m + 8 * h + r].position;
  };
  Place own[2] = {};
  const int own_rows = MTILES == 4 ? t : 0;
  const bool writes = MTILES == 4 || t == 0;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    int b, n, inside;
    i64 page;
    if (writes && row_of(own_rows, h, b, n) && locate(b, (column[b] + n) / TILE, page, inside)) {
      own[h].tile = tile_at(page, inside);
      own[h].token = (column[b] + n) % TILE;
    }
  }
#else
  const int quads = ((tokens + 2 * TILE - 2) / TILE + 3) / 4;  // tiles touched at most, by fours
  const i64 row_batch = item / quads;
  active = row_batch < batch;
  const int b = active ? static_cast<int>(row_batch) : 0;
  const int start = column[b];
  const int tile0 = start / TILE + 4 * static_cast<int>(item - row_batch * quads);
  const int token0 = tile0 * TILE - start + r;
  active = active && start >= 0 && tile0 * TILE < start + tokens;
#pragma unroll
  for (int k = 0; k < 2 * MTILES; k++) {
    int n = token0 + 8 * k;
    if (active && n >= 0 && n < tokens) valid |= 1u << k;
  }
  const element* base = x + b * x_batch + head * x_head;
  const int position0 = UNROTATE ? position[b] + token0 : 0;
  // A row without a token reads another one in its place: loads wait for nothing that way.
  auto row_pointer = [&](int m, int h) {
    return base + min(max(token0 + 16 * m + 8 * h, 0), tokens - 1) * x_token;
  };
  [[maybe_unused]] auto row_position = [&](int m, int h) { return position0 + 16 * m + 8 * h; };
  u8* own = nullptr;  // this lane writes the tile 4 * quad + t
  {
    int inside;
    i64 page;
    if (active && locate(b, tile0 + t, page, inside)) own = tile_at(page, inside);
  }
  u32 held = 0;  // codes of the pair's first group
#endif

  const int2* map = maps + head * (HEAD_DIM / 2) + (t & (LANES - 1));
#if HAS_GAIN
  // RoPE keeps lengths, so the gain needs no turning, only the scale of the turned channels.
  __shared__ float inverse_gains[MAX_WARPS][MTILES * 16];
  float* inverse_gain = inverse_gains[threadIdx.x >> 5];
  if (active) {
#pragma unroll
    for (int m = 0; m < MTILES; m++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        float sum = 0;
#pragma unroll 4
        for (int k = t; k < HEAD_DIM / 2; k += 4) {
          int2 entry = maps[head * (HEAD_DIM / 2) + k];
          float2 v = load_two(row_pointer(m, h), source_of(entry.x), source_of(entry.y));
          if (UNROTATE && turn_of(entry.x)) v.x *= inverse_scale;
          if (UNROTATE && turn_of(entry.y)) v.y *= inverse_scale;
          sum += v.x * v.x + v.y * v.y;
        }
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        __half gain = __float2half_rn(fminf(sqrtf(sum * (1.0f / HEAD_DIM)), HALF_MAX));
        float g = __half2float(gain);
        if (t == 0) inverse_gain[16 * m + 8 * h + r] = g > 0 ? 1.0f / g : 0.0f;
        if (first == 0 && t == 0 && (valid >> (2 * m + h) & 1)) {
          int inside;
          i64 page;
#if FLAT
          int b, n;
          row_of(m, h, b, n);
          int c = column[b] + n;
#else
          int c = start + token0 + 16 * m + 8 * h;
#endif
          if (locate(b, c / TILE, page, inside))
            gains[page * gain_page + head * gain_head + static_cast<i64>(inside) * TILE + c % TILE] =
                gain;
        }
      }
    __syncwarp();
  }
#endif

  int stage = 0;
#pragma unroll 1
  for (int place = first; place < last; place++) {
    Rows16 a[MTILES];
    u32 slow = 0;  // rows that need the exact loop, as in `valid`
    if (active) {
      const float4 scale = scaling[head * GROUPS + place];
      const int2 entry = map[place * LANES];
      float2 factors = make_float2(scale.x, scale.x);
#if UNROTATE
      const u64* pair_steps = steps + head * steps_head;
      const u64 step_x = turn_of(entry.x) ? pair_steps[pair_of(entry.x)] : 0;
      const u64 step_y = turn_of(entry.y) ? pair_steps[pair_of(entry.y)] : 0;
      const float sign_x = turn_of(entry.x) == 1 ? 1.0f : -1.0f;
      const float sign_y = turn_of(entry.y) == 1 ? 1.0f : -1.0f;
      if (turn_of(entry.x)) factors.x *= inverse_scale;
      if (turn_of(entry.y)) factors.y *= inverse_scale;
#endif
#if HAS_METRIC
      float2 form[CHANNELS];  // our two columns of the group's matrix
      const float* matrix = metric + static_cast<i64>(head * GROUPS + place) * CHANNELS * CHANNELS;
#pragma unroll
      for (int i = 0; i < CHANNELS; i++)
        form[i] = reinterpret_cast<const float2*>(matrix)[i * LANES + (t & (LANES - 1))];
#endif
      float part[MTILES][2], most = 0;  // this lane's share of the squared lengths
#pragma unroll
      for (int m = 0; m < MTILES; m++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
          float2 v = load_two(row_pointer(m, h), source_of(entry.x), source_of(entry.y));
#if UNROTATE
          const float2 w = load_partners(row_pointer(m, h), entry);
          v.x = unturn(v.x, w.x, row_position(m, h), step_x, sign_x);
          v.y = unturn(v.y, w.y, row_position(m, h), step_y, sign_y);
#endif
#if HAS_GAIN
          const float inverse = inverse_gain[16 * m + 8 * h + r];
          v.x *= inverse, v.y *= inverse;
#endif
          v.x *= factors.x, v.y *= factors.y;
#if HAS_METRIC
          float2 sum = make_float2(0, 0);
#pragma unroll
          for (int s = 0; s < LANES; s++) {
            float p = __shfl_sync(~0u, v.x, (lane & ~3) + s), q = __shfl_sync(~0u, v.y, (lane & ~3) + s);
            sum.x += p * form[2 * s].x + q * form[2 * s + 1].x;
            sum.y += p * form[2 * s].y + q * form[2 * s + 1].y;
          }
          v = sum;
#endif
          u32 hi = pack_saturated(v.x, v.y), lo = 0;
          if (SPLIT) {
            float2 rounded = __half22float2(as_half2(hi));
            lo = pack_saturated(v.x - rounded.x, v.y - rounded.y);
          }
          if (CHANNELS < 8) hi = t < LANES ? hi : t < 2 * LANES ? lo : 0;
          a[m].hi[h] = hi, a[m].lo[h] = lo;
          part[m][h] = t < LANES ? v.x * v.x + v.y * v.y : 0;
          most = max_nan(most, part[m][h]);
          // No more loads in flight than there are registers for.
          if (SPLIT && h == 1 && m == 1) asm volatile("" ::: "memory");
        }
      // The sum of the lanes' largest shares bounds every row; only if it is too large, look closer.
      most += __shfl_xor_sync(~0u, most, 1);
      most += __shfl_xor_sync(~0u, most, 2);
      if (__any_sync(~0u, !(most <= scale.y))) {
#pragma unroll
        for (int m = 0; m < MTILES; m++)
#pragma unroll
          for (int h = 0; h < 2; h++) {
            float sum = part[m][h] + __shfl_xor_sync(~0u, part[m][h], 1);
            sum += __shfl_xor_sync(~0u, sum, 2);
            if (!(sum <= scale.y)) slow |= 1u << (2 * m + h);
          }
      }
    }
    const bool any_slow = __any_sync(~0u, slow != 0);

    u32 top[2] = {}, code[2] = {};  // of the two rows this lane writes, after reduction
#pragma unroll 1
    for (int pass = 0; pass < PASSES; pass++) {
      copy_async_wait();
      __syncthreads();
      const uint4* table = stages[stage & 1];
      stage++;
      if (stage < (last - first) * PASSES)
        stage_table(stages[stage & 1], tables + static_cast<i64>(stage) * IMAGE);
      if (!active) continue;

      const float4* offsets = reinterpret_cast<const float4*>(table + FRAGMENTS) + t;
      u32 best[MTILES][2] = {};
#pragma unroll
      for (int quad = 0; quad < TABLE / 32; quad++) {
        const uint4 centroids = table[quad * 32 + lane];
#pragma unroll
        for (int k = 0; k < 4; k++) {
          const int j = 4 * quad + k;
          const float4 start = offsets[4 * j];
#pragma unroll
          for (int m = 0; m < MTILES; m++) {
            float d[4];
            distances(d, a[m], component(centroids, k), start);
#pragma unroll
            for (int h = 0; h < 2; h++) {
              u32 p = embed(d[2 * h], radix, 255 - 8 * j - 3, 2 * h < EMBED_SHIFTS);
              u32 q = embed(d[2 * h + 1], radix, 255 - 8 * j - 4 - 3, 2 * h + 1 < EMBED_SHIFTS);
              best[m][h] = max(max(p, q), best[m][h]);
            }
          }
        }
      }

      // The lanes of a quad share their maxima so that lane t ends with the m-th rows, m = t.
      u32 word[2];
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const u32 rank = 3 - t;
        if constexpr (MTILES == 4) {
          u32 v[2];
#pragma unroll
          for (int m = 0; m < 2; m++) {
            u32 low = best[m][h] + rank, high = best[m + 2][h] + rank;
            u32 got = __shfl_xor_sync(~0u, t & 2 ? low : high, 2);
            v[m] = max(t & 2 ? high : low, got);
          }
          u32 got = __shfl_xor_sync(~0u, t & 1 ? v[0] : v[1], 1);
          word[h] = max(t & 1 ? v[1] : v[0], got);
        } else {
          u32 v = best[0][h] + rank;
          v = max(v, __shfl_xor_sync(~0u, v, 1));
          word[h] = max(v, __shfl_xor_sync(~0u, v, 2));
        }
      }
      u32 now_top[2] = {word[0] >> 8, word[1] >> 8};
      u32 now_code[2] = {255 - (word[0] & 255), 255 - (word[1] & 255)};

      if (any_slow) {
        float score[MTILES][2];
        u32 which[MTILES][2];
#pragma unroll
        for (int m = 0; m < MTILES; m++)
          score[m][0] = score[m][1] = -3e38f, which[m][0] = which[m][1] = 0;
#pragma unroll 1
        for (int j = 0; j < TABLE / 8; j++) {
          const u32 centroids =
              reinterpret_cast<const u32*>(table)[(j >> 2) * 128 + lane * 4 + (j & 3)];
          const float4 start = offsets[4 * j];
#pragma unroll
          for (int m = 0; m < MTILES; m++) {
            float d[4];
            distances(d, a[m], centroids, start);
#pragma unroll
            for (int k = 0; k < 4; k++)
              if (d[k] > score[m][k >> 1]) {
                score[m][k >> 1] = d[k];
                which[m][k >> 1] = 8 * j + 4 * (k & 1) + t;
              }
          }
        }
#pragma unroll
        for (int m = 0; m < MTILES; m++)
#pragma unroll
          for (int h = 0; h < 2; h++) {
            u32 s = ordered(score[m][h]), c = which[m][h];
#pragma unroll
            for (int distance = 1; distance < 4; distance *= 2) {
              u32 other = __shfl_xor_sync(~0u, s, distance);
              u32 its_code = __shfl_xor_sync(~0u, c, distance);
              if (other > s || (other == s && its_code < c)) s = other, c = its_code;
            }
            if ((MTILES == 1 || t == m) && (slow >> (2 * m + h) & 1)) now_top[h] = s, now_code[h] = c;
          }
      }
#pragma unroll
      for (int h = 0; h < 2; h++)
        if (pass == 0 || now_top[h] > top[h]) top[h] = now_top[h], code[h] = now_code[h] + 256 * pass;
    }
    if (!active) continue;

#if FLAT
    put_code(own[0], place, code[0]);
    put_code(own[1], place, code[1]);
#else
    // Two groups make whole words. Bits 14 and 30 tell whether there is such a token.
    u32 mine = code[0] | code[1] << 16;
    mine |= (valid >> (2 * t) & 1) << 14 | (valid >> (2 * t + 1) & 1) << 30;
    if ((place & 1) == 0) {
      held = mine;
    } else {
      u32 even = held, odd = mine;
      int word = 4 * (place - 1) + r / 2;
      if (KIND_KEY) {
        const int unit = place / 2;
        word = 32 * (unit / 4) + r * min(4, UNITS - unit / 4 * 4) + unit % 4;
      } else {
        // A word has two neighbouring rows of one group: even rows take the first group.
        u32 got = __shfl_xor_sync(~0u, r & 1 ? held : mine, 4);
        even = r & 1 ? got : held;
        odd = r & 1 ? mine : got;
        word += 4 * (r & 1);
      }
      u32 present = (even >> 14 & 1) | (odd >> 14 & 1) << 1 | (even >> 30 & 1) << 2 | (odd >> 30 & 1) << 3;
      if (own != nullptr && present) put_word(own, word, even, odd, present);
    }
#endif
  }
}
