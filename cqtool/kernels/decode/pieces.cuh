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
// 10-bit codes at `shift` of `rest`, or the bits of a 6-bit code in `rest`. One dot product instruction
// does shift, mask and sum.
template <int BITS>
DEVICE u32 row_at(u32 base, u32 word, u32 pick, u32 rest, int shift) {
  if constexpr (BITS > 8) base += ((rest >> shift) & 3u) << 15;
  if constexpr (BITS == 6) word &= rest;
  return __dp4a(word, pick, base);
}
// Where a word of codes lies in a tile: the byte, or as place_of_6 counts.
template <int BITS>
DEVICE int place_of(int word, int words) {
  return BITS == 6 ? place_of_6(word, words) : 4 * word;
}
// What picks the i-th code of a word, and the bits of 6-bit codes that it is in. Of the fourth, each
// byte has two bits, times 64.
template <int BITS>
DEVICE u32 code_pick(int i) {
  return BITS == 6 && i == 3 ? 0x200802u : 0x80u << (8 * i);
}
DEVICE u32 code_bits(int i) { return i == 3 ? 0xc0c0c0u : 0x3f3f3fu; }
// The index-th word of a lane. Of 6 bits, what was loaded is joined to three bytes (and one more of
// anything); twins were loaded as one.
template <int BITS>
DEVICE u32 word_at(const u32* codes, const u32* upper, int index, int twins) {
  if constexpr (BITS == 6) {
    const int of = index < twins ? index & ~1 : index;
    return __byte_perm(codes[of], upper[of], of == index ? 0x0410 : 0x0532);
  } else {
    return codes[index];
  }
}
// What row_at asks for beside it.
template <int BITS>
DEVICE u32 rest_at(const u32* upper, int index, int code) {
  return BITS == 6 ? code_bits(code) : BITS > 8 ? upper[index] : 0;
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
DEVICE u32 load_half(const u8* tile, int offset) {
  return __ldg(reinterpret_cast<const u16*>(tile + offset));
}
// The index-th word of a lane from a tile of 6-bit codes, by its place there. Of twins, the first
// brings both.
DEVICE void load_6(u32& codes, u32& upper, const u8* tile, int place, int groups, int index, int twins) {
  if (index >= twins) {
    codes = load_half(tile, 2 * place), upper = tile[8 * groups + place];
  } else if (index % 2 == 0) {
    codes = load_word(tile, 2 * place), upper = load_half(tile, 8 * groups + place);
  }
}

// The rotated queries of a warp's next step, as B fragments in shared memory.
DEVICE u32 exchange_offset(int slot, int combo, int hi, int t) {
  int place = ((slot / SWZ) * COMBOS + combo) * SWZ + slot % SWZ;
  return ((place * 2 + (hi ^ ((slot / SWZ) & 1))) * 4 + t) * (2 * KC);
}
