// Looking up entries, turning pairs of channels, finding tiles: the small pieces of decode.cu.
#pragma once
#include "constants.cuh"

extern __shared__ __align__(128) u8 smem[];

struct Entry {
  u32 x[4];
};
template <int BYTES>
DEVICE Entry load_entry(u32 offset) {
  Entry e;
  if constexpr (BYTES == 16) {
    uint4 v = *reinterpret_cast<const uint4*>(smem + offset);
    e.x[0] = v.x, e.x[1] = v.y, e.x[2] = v.z, e.x[3] = v.w;
  } else if constexpr (BYTES == 8) {
    uint2 v = *reinterpret_cast<const uint2*>(smem + offset);
    e.x[0] = v.x, e.x[1] = v.y;
  } else {
    e.x[0] = *reinterpret_cast<const u32*>(smem + offset);
  }
  return e;
}

// base + 128 * (the code of `word` that `pick` selects: 128 in its byte), with the two upper bits of
// 10-bit codes at `shift` of `upper`. One dot product instruction does shift, mask and sum.
template <int BITS>
DEVICE u32 row_at(u32 base, u32 word, u32 pick, u32 upper, int shift) {
  if constexpr (BITS > 8) base += ((upper >> shift) & 3u) << 15;
  return __dp4a(word, pick, base);
}

// Half-precision rotations of two pairs of channels: on by their angles, back by them, and on by
// angles whose cosines are 1.
DEVICE void turn_on(u32& one, u32& two, u32 cosine, u32 sine) {
  __half2 a = as_half2(one), b = as_half2(two), c = as_half2(cosine), s = as_half2(sine);
  one = as_u32(__hfma2(a, c, __hneg2(__hmul2(b, s))));
  two = as_u32(__hfma2(b, c, __hmul2(a, s)));
}
DEVICE void turn_back(u32& one, u32& two, u32 cosine, u32 sine) {
  turn_on(one, two, cosine, sine ^ 0x80008000u);
}
DEVICE void turn_little(u32& one, u32& two, u32 sine) {
  __half2 a = as_half2(one), b = as_half2(two), s = as_half2(sine);
  one = as_u32(__hfma2(__hneg2(b), s, a));
  two = as_u32(__hfma2(a, s, b));
}

// The two registers of a lane's entries that turn with each other.
struct PairOf {
  u32 *one, *two;
  DEVICE PairOf(Entry& x, Entry& y, int i) {
    if constexpr (PAIRING == 1) {
      Entry& e = i < KREGS / 2 ? x : y;
      one = &e.x[i % imax(1, KREGS / 2)];
      two = &e.x[i % imax(1, KREGS / 2) + KREGS / 2];
    } else {
      one = &x.x[i], two = &y.x[i];
    }
  }
};

// Where the tiles of one batch row and head lie.
struct Tiles {
  const u8* base;
#if PAGED
  const int* pages;
  i64 page_bytes;  // of one page of all heads
  int shift;       // log2(tiles a page)
#endif
  template <int TILE_BYTES>
  DEVICE const u8* at(int tile) const {
#if PAGED
    i64 page = pages[tile >> shift];
    return base + page * page_bytes + static_cast<i64>(tile & ((1 << shift) - 1)) * TILE_BYTES;
#else
    return base + static_cast<i64>(tile) * TILE_BYTES;
#endif
  }
};

DEVICE u32 load_word(const u8* tile, int offset) {
  return __ldg(reinterpret_cast<const u32*>(tile + offset));
}

// The rotated queries of a warp's next step, as B fragments in shared memory.
DEVICE u32 exchange_offset(int slot, int combo, int hi, int t) {
  int place = ((slot / SWZ) * COMBOS + combo) * SWZ + slot % SWZ;
  return ((place * 2 + (hi ^ ((slot / SWZ) & 1))) * 4 + t) * (2 * KC);
}
