// Attention of a few query rows over coupled codes, decoded on the way into the tensor cores.
//
// One block holds the tables of one kv head in shared memory. Teams of its warps take units (a batch
// row and a split of its tokens), and write the result, or what cq_finish merges. MODE 0 (cq_decode)
// does scores and values in one pass. Where the tables of keys and values do not fit together, MODE 1
// (cq_scores) writes raw scores and MODE 2 (cq_values) goes on from them.
//
// Scores are keys (A, 16 tokens x channels) times queries (B, channels x 8 columns). A lane decodes
// the channels of tokens r and r + 8 that it owns. So that eight neighbouring lanes never meet in a
// bank, odd tokens load "hi" before "lo" (and, with entries of less than 16 bytes, slots in another
// order): every order is a column of B with its channels ordered alike, and a token reads its own.
// The columns left are used for further tiles: with one query row the query is turned to four tile
// middles at once. RoPE's angle is split: the query carries the middle of the tile (from integer
// phases), the key its offset from there, -8 to 7 (constants in registers).
//
// Values are the A operand too (rows: groups, k: token x channel parity), weights times parity are
// B; lanes of different t read different groups, which the columns keep apart again (VSEL of them).
#include "pieces.cuh"

#if MODE == 0
#define KERNEL cq_decode
#elif MODE == 1
#define KERNEL cq_scores
#else
#define KERNEL cq_values
#endif

// key_codes, value_codes: tiles (layout.py); row b's are those of page b, or of block_table's pages.
// tables: float16 images [kv_heads]. query: element strides (batch, head, token).
// pair_channels [kv_heads, KEY_DIM / 2] (first, second model channel), steps likewise.
// turns float16 [kv_heads, TURN_ROWS, 2, KEY_DIM / 2]: cosines and sines of small offsets.
// first, coded, total, origin: int32 [batch]: first visible column, columns coded, columns in all,
// and the column of position 0. scratch: raw scores of MODE 1 and 2.
// part_out float [batch, kv_heads, splits, row groups * ROWS, VALUE_DIM], part_ml the (max, sum).
// out: null, or where results go (element strides batch, head, token) when there is one split and
// nothing for cq_finish to add; value_channels [kv_heads, VALUE_DIM]: the model channel of each.
// team: warps that share a unit, a divisor of WARPS.
extern "C" __global__ void __launch_bounds__(WARPS * 32, 1)
KERNEL(const u8* __restrict__ key_codes, const u8* __restrict__ value_codes,
       const u8* __restrict__ key_tables, const u8* __restrict__ value_tables,
       const element* __restrict__ query, i64 query_b, i64 query_h, i64 query_l,
       const int2* __restrict__ pair_channels, const u64* __restrict__ steps,
       const __half* __restrict__ turns, const u16* __restrict__ natural_place, const int* __restrict__ first,
       const int* __restrict__ coded, const int* __restrict__ total,
       const int* __restrict__ origin, const int* __restrict__ block_table, int pages_per_row,
       int tiles_per_page, const u8* __restrict__ mask, i64 mask_stride,
       const __half* __restrict__ key_gain, const __half* __restrict__ value_gain, i64 gain_stride,
       float* __restrict__ scratch, i64 scratch_stride, float* __restrict__ part_out,
       float2* __restrict__ part_ml, element* __restrict__ out, i64 out_b, i64 out_h, i64 out_l,
       const int* __restrict__ value_channels, int batch, int kv_heads, int queries_per_head, int query_length,
       int splits, int team, int sinks, int sliding, float query_scale, float cap) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, r = lane >> 2, t = lane & 3;
  const int head = blockIdx.x % kv_heads, part = blockIdx.x / kv_heads;
  const int parts = gridDim.x / kv_heads;
  const int row0 = blockIdx.y * RS, rows_padded = gridDim.y * RS;
  const int rows_all = queries_per_head * query_length;
  const int slot0 = MODE == 1 ? blockIdx.z * KSLOTS : 0;
  const int query_slot0 = PAIRING == 2 ? 0 : slot0;
  const int block0 = MODE == 2 ? blockIdx.z * VBLOCKS : 0;

  allow_next_kernel();
  const u8* const key_source = key_tables +
      (static_cast<i64>(head) * ceil_div(KSLOTS_ALL, KSPB) + slot0 / KSPB) * (KCENT * 128);
  const u8* const value_source =
      value_tables + (static_cast<i64>(head) * VBLOCKS_ALL + block0) * (VCENT * 128);
#if __CUDA_ARCH__ >= 900
  __shared__ __align__(8) u64 tables_here;
  if (threadIdx.x == 0) bulk_prepare(&tables_here);
  __syncthreads();
  if (threadIdx.x == 0) {
    bulk_expect(&tables_here, (SCORES ? KEY_TABLE : 0) + (VALUES ? VALUE_TABLE : 0));
    if constexpr (SCORES) bulk_copy(smem, key_source, KEY_TABLE, &tables_here);
    if constexpr (VALUES) bulk_copy(smem + KEY_SMEM, value_source, VALUE_TABLE, &tables_here);
  }
#else
  if constexpr (SCORES)
    for (int i = threadIdx.x; i < KEY_TABLE / 16; i += WARPS * 32)
      copy_async_16(smem + i * 16, key_source + i * 16);
  if constexpr (VALUES)
    for (int i = threadIdx.x; i < VALUE_TABLE / 16; i += WARPS * 32)
      copy_async_16(smem + KEY_SMEM + i * 16, value_source + i * 16);
#endif
  u8* const mine = smem + KEY_SMEM + VALUE_SMEM + warp * WARP_SMEM;
  const u32 exchange = KEY_SMEM + VALUE_SMEM + warp * WARP_SMEM;
  Pairs* const kept_queries = reinterpret_cast<Pairs*>(mine + UNION);
  __half* const weights = reinterpret_cast<__half*>(mine + UNION + RAW);
  __half* const natural = reinterpret_cast<__half*>(mine + UNION + RAW + WEIGHTS);

  // ---- what a lane keeps: where its codes and entries lie, its angles within a tile -----------
  // Where a slot's word lies in a tile: constants apart from the lane's own where slots are whole.
  // Words of 6-bit codes are counted, others are at bytes.
  constexpr bool WHOLE =
      KUNITS % 4 == 0 && KSTEPS == KSLOTS && SWT == 1 && (KEY_BITS != 6 || KTWINS == KSLOTS);
  int key_word[KSTEPS];
  u32 key_base[KSPB];
  u32 turn_cos[2][QSTEPS][KREGS], turn_sin[2][QSTEPS][KREGS];
  const int swap = (r >> 1) & (SWT - 1);
  u32 tile_cos[PP][imax(1, NOFF - 1)], tile_sin[PP][imax(1, NOFF - 1)];
  u32 step_cos[QSTEPS][KREGS], step_sin[QSTEPS][KREGS];  // of the next set of B fragments
  u32 advance[PP][2];  // turns / 2^32 of a step, of each pair
  u32 key_pick[4], late_bits = 0;  // the latter: code_bits of the third code read
  // The first of the two pairs in register i of a slot (see "pairing" in layout.py); any where the
  // slot is padding.
  auto first_pair = [&](int slot, int i) {
    const int unit = (query_slot0 + slot) * 4 + t;
    int pair = unit * KC + 2 * i;
    if constexpr (PAIRING == 1) {
      const int hi = i < KREGS / 2 ? (r & 1) : 1 - (r & 1);
      pair = (unit * 2 + hi) * (KC / 2) + 2 * (i % imax(1, KREGS / 2));
    }
    return slot < QSLOTS && unit < KUNITS ? pair : 0;
  };
  // Angles between the tiles of a set of B fragments: loaded anew where they are seldom needed.
  auto load_tile_turns = [&] {
#pragma unroll
    for (int k = 0; k < PP; k++) {
      int pair = min(2 * (lane + 32 * k), KPAIRS - 2) + query_slot0 * 4 * KC;
      if (!ROTATE || pair >= KEY_DIM / 2) pair = 0;
#pragma unroll
      for (int o = 1; o < NOFF; o++) {
        const __half* row = turns + (head * TURN_ROWS + 15 + o) * KEY_DIM;
        tile_cos[k][o - 1] = *reinterpret_cast<const u32*>(row + pair);
        tile_sin[k][o - 1] = *reinterpret_cast<const u32*>(row + KEY_DIM / 2 + pair);
      }
    }
  };
  if constexpr (SCORES) {
#pragma unroll
    for (int s = 0; s < KSTEPS; s++) {
      int slot = s ^ swap;
      int lanes = min(4, KUNITS - 4 * (slot0 + slot));
      bool real = slot < KSLOTS && t < lanes;
      key_word[s] = real ? place_of<KEY_BITS>(32 * (slot0 + slot) + r * lanes + t, 8 * KUNITS) : 0;
    }
#pragma unroll
    for (int s = 0; s < QSTEPS; s++) {
      if constexpr (ROTATE) {
        // Offsets are counted from the middle of the tile. Odd tokens, and columns of odd order, hold
        // hi where even ones hold lo, which turns the sine's sign.
        const u32 flip = PAIRING != 1 && (r & 1) ? 0x80008000u : 0u;
#pragma unroll
        for (int i = 0; i < KREGS; i++) {
          const int pair = first_pair(s ^ swap, i), query_pair = first_pair(s ^ (swap & (SWZ - 1)), i);
          auto row = [&](int index, int of) { return turns + (head * TURN_ROWS + index) * KEY_DIM + of; };
          auto word = [](const __half* at) { return *reinterpret_cast<const u32*>(at); };
          turn_cos[0][s][i] = word(row(8 - r, pair));
          turn_cos[1][s][i] = word(row(r, pair));
          turn_sin[0][s][i] = word(row(8 - r, pair) + KEY_DIM / 2) ^ flip ^ 0x80008000u;
          turn_sin[1][s][i] = word(row(r, pair) + KEY_DIM / 2) ^ flip;
          if constexpr (EVERY > 1) {
            step_cos[s][i] = word(row(15 + NOFF, query_pair));
            step_sin[s][i] = word(row(15 + NOFF, query_pair) + KEY_DIM / 2) ^ flip;
          }
        }
      }
    }
    // Odd tokens take hi first.
#pragma unroll
    for (int i = 0; i < 4; i++) key_pick[i] = code_pick<KEY_BITS>(PAIRING == 2 ? i : i ^ (r & 1));
    late_bits = code_bits(PAIRING == 2 ? 2 : 2 ^ (r & 1));
#pragma unroll
    for (int s = 0; s < KSPB; s++)
      key_base[s] = (((s ^ swap) % KSPB) * 8 + (r & 1) * 4 + t) * (2 * KC);
    // Padding of the queries, and channels that a part never writes, stay zero.
    if constexpr (PADDED)
      for (int i = lane; i < EXCHANGE / 4; i += 32) reinterpret_cast<u32*>(mine)[i] = 0;
    if constexpr (PAIRING == 2 && KEY_PARTS > 1)
      for (int i = lane; i < NATURAL / 4; i += 32) reinterpret_cast<u32*>(natural)[i] = 0;
#pragma unroll
    for (int k = 0; k < PP; k++) {
      int pair = min(2 * (lane + 32 * k), KPAIRS - 2) + query_slot0 * 4 * KC;
      bool real = pair < KEY_DIM / 2;
      prefetch(pair_channels + head * (KEY_DIM / 2) + (real ? pair : 0));
      real = real && ROTATE;
      u64 s0 = real ? steps[head * (KEY_DIM / 2) + pair] : 0;
      u64 s1 = real ? steps[head * (KEY_DIM / 2) + pair + 1] : 0;
      advance[k][0] = static_cast<u32>((s0 * (16 * NOFF * EVERY) + 0x80000000u) >> 32);
      advance[k][1] = static_cast<u32>((s1 * (16 * NOFF * EVERY) + 0x80000000u) >> 32);
    }
    if constexpr (EVERY == 1) load_tile_turns();
  }
  auto key_place = [&](int s) { return WHOLE ? key_word[0] + (KEY_BITS == 6 ? 32 : 128) * s : key_word[s]; };
  int value_word[HS] = {};
  auto value_place = [&](int i) {
    constexpr bool WHOLE_BLOCKS = VALUE_BITS == 6 ? VTWINS == VBLOCKS : VGROUPS % NB == 0;
    return WHOLE_BLOCKS ? value_word[i % QPB] + (i / QPB) * NB * (VALUE_BITS == 6 ? 4 : 16) : value_word[i];
  };
  u32 value_base[QPB];
  u32 pick0 = 0x4444, pick1 = 0x4444;  // PRMT selectors: a weight into its parity's half, or zero
  if constexpr (VALUES && MATRICES) {
    // A lane reads the entries of one group and four tokens, and gives them as rows of a matrix
    // each. Rows 2x, 2x + 1 of a matrix are two tokens of group x; its eight rows lie in different
    // banks, odd ones in the second copy. Matrices 1 and 3 are of the block's later groups, 2 and 3
    // of two further tokens.
    const int matrix = lane / 8, odd = lane & 1;
    const int column = (matrix & 1) * 4 + lane % 8 / 2, tokens = (matrix & 2) + odd;
    value_base[0] = shared_address(smem) + KEY_SMEM + odd * VALUE_TABLE + (column ^ (4 * odd)) * 16;
#pragma unroll
    for (int block = 0; block < VBLOCKS; block++) {
      int group = (block0 + block) * NB + column;
      value_word[block] = group < VGROUPS ? place_of<VALUE_BITS>(group * 4 + tokens, 4 * VGROUPS) : 0;
    }
  } else if constexpr (VALUES) {
    const int u = t % TS;
#pragma unroll
    for (int q = 0; q < QPB; q++) {
      int column = (r + 8 * q + ST * u) & (NB - 1);
      int copy = VCOPIES == 2 ? (t / TS) & 1 : 0;
      value_base[q] = KEY_SMEM + copy * VALUE_TABLE + (column ^ (copy * (NB / 4))) * (2 * VC);
#pragma unroll
      for (int block = 0; block < VBLOCKS; block++) {
        int group = (block0 + block) * NB + column;
        value_word[block * QPB + q] =
            group < VGROUPS ? place_of<VALUE_BITS>(group * 4 + t, 4 * VGROUPS) : 0;
      }
    }
    if ((r >> 1) % TS == u) {
      pick0 = r & 1 ? 0x1044 : 0x4410;
      pick1 = r & 1 ? 0x3244 : 0x4432;
    }
  }
  const int my_combo = 2 * t / ORD;  // of column tile 0; column tile j adds 8 / ORD
  const int my_off = my_combo / RS;
  __shared__ float2 team_ml[WARPS][RS];
#if __CUDA_ARCH__ >= 900
  bulk_wait(&tables_here);
#else
  copy_async_wait();
#endif
  if constexpr (VALUES && VCOPIES == 2) {
    // The second copy, its columns exchanged. A thread copies what it fetched itself, if it did.
    uint4* table = reinterpret_cast<uint4*>(smem + KEY_SMEM);
#pragma unroll 4
    for (int i = threadIdx.x; i < VALUE_TABLE / 16; i += WARPS * 32)
      table[VALUE_TABLE / 16 + (i ^ (MATRICES ? 4 : 2))] = table[i];
  }
  __syncthreads();
  // Up to here only constants were read.
  wait_for_previous_kernel();

  // The warps of a team share a unit and merge what they found.
  const int units = batch * splits, team_index = warp / team, member = warp % team;
  auto team_sync = [&] {
    if (team == 1) {
      __syncwarp();
    } else {
      asm volatile("bar.sync %0, %1;" ::"r"(1 + team_index), "r"(32 * team) : "memory");
    }
  };
  for (int unit = team_index * parts + part; unit < units; unit += parts * (WARPS / team)) {
    const int b = unit / splits, split = unit - b * splits;
    const int shares = splits * team, mine_of = split * team + member;
    const int end = coded[b], columns = total[b], zero = origin[b];
    int begin = first[b] + sinks;
    // Queries of the lane's pairs, not turned.
    float first_of[RS][PP][2], second_of[RS][PP][2];
    u64 step[PP][2];
    int2 channels[PP][2];
    if constexpr (SCORES) {
#pragma unroll
      for (int k = 0; k < PP; k++) {
        int pair = 2 * (lane + 32 * k) + query_slot0 * 4 * KC;
        if (2 * (lane + 32 * k) >= KPAIRS || pair >= KEY_DIM / 2) pair = 0;
#pragma unroll
        for (int i = 0; i < 2; i++) {
          step[k][i] = steps[head * (KEY_DIM / 2) + pair + i];
          channels[k][i] = pair_channels[head * (KEY_DIM / 2) + pair + i];
        }
      }
      int of = row0 / query_length, token = row0 % query_length;
#pragma unroll
      for (int row = 0; row < RS; row++) {
        const bool real_row = row0 + row < rows_all;
        const element* q = query + b * query_b +
            (head * queries_per_head + (real_row ? of : 0)) * query_h + (real_row ? token : 0) * query_l;
        if (++token == query_length) token = 0, of++;
#pragma unroll
        for (int k = 0; k < PP; k++) {
          const int local = 2 * (lane + 32 * k);
          const bool real = real_row && local < KPAIRS && local + query_slot0 * 4 * KC < KEY_DIM / 2;
          Pairs found;
#pragma unroll
          for (int i = 0; i < 2; i++) {
            found.first[i] = q[channels[k][i].x], found.second[i] = q[channels[k][i].y];
            if (!real) found.first[i] = found.second[i] = from_float(0.f);
          }
          if constexpr (EVERY > 1) {
            kept_queries[(row * PP + k) * 32 + lane] = found;
          } else {
#pragma unroll
            for (int i = 0; i < 2; i++) {
              first_of[row][k][i] = to_float(found.first[i]) * query_scale;
              second_of[row][k][i] = to_float(found.second[i]) * query_scale;
            }
          }
        }
      }
    }
    const int oldest_query = columns - query_length;  // column of query 0
    if (sliding > 0) begin = max(begin, oldest_query - sliding + 1);
    const int tile_lo = begin / 16, tile_hi = ceil_div(end, 16);
    const int share = ceil_div(ceil_div(max(0, tile_hi - tile_lo), shares), TPS) * TPS;
    const int tile0 = tile_lo + mine_of * share, tile1 = min(tile_hi, tile0 + share);
    const int stop = min(end, tile1 * 16);

    Tiles keys, values;
    {
      i64 head_tiles = static_cast<i64>(head) * tiles_per_page;
      i64 page_tiles = static_cast<i64>(kv_heads) * tiles_per_page;
#if PAGED
      keys.pages = values.pages = block_table + static_cast<i64>(b) * pages_per_row;
      keys.shift = values.shift = 31 - __clz(tiles_per_page);
      keys.page_bytes = page_tiles * KEY_TILE, values.page_bytes = page_tiles * VALUE_TILE;
#else
      head_tiles += b * page_tiles;
#endif
      keys.base = key_codes + head_tiles * KEY_TILE;
      values.base = value_codes + head_tiles * VALUE_TILE;
    }

    int row_begin[NTK];  // first visible column of the lane's rows
#pragma unroll
    for (int j = 0; j < NTK; j++) {
      row_begin[j] = begin;
      int row = row0 + (my_combo + j * (8 / ORD)) % RS;
      if (sliding > 0 && query_length > 1)
        row_begin[j] = max(first[b] + sinks, oldest_query + row % query_length - sliding + 1);
    }

    u32 phase[PP][2];  // of the coming set of B fragments, in turns / 2^32
    if constexpr (SCORES) {
      const i64 position = static_cast<i64>(tile0) * 16 + 8 - zero;
#pragma unroll
      for (int k = 0; k < PP; k++)
#pragma unroll
        for (int i = 0; i < 2; i++) phase[k][i] = static_cast<u32>((position * step[k][i]) >> 32);
    }

    float acc[MT][NTV][4];
    if constexpr (VALUES) {
#pragma unroll
      for (int i = 0; i < MT * NTV * 4; i++) (&acc[0][0][0])[i] = 0.f;
    }
    float peak[NTK], sum[NTK];
#pragma unroll
    for (int j = 0; j < NTK; j++) peak[j] = NEVER, sum[j] = 0.f;

    u32 key_codes_now[TPS][KSTEPS] = {}, key_upper[TPS][KSTEPS] = {};
    auto fetch_keys = [&](int tile) {
#pragma unroll
      for (int o = 0; o < TPS; o++) {
        const u8* at = keys.at<KEY_TILE>(min(tile + o, tile1 - 1));
#pragma unroll
        for (int s = 0; s < KSTEPS; s++) {
          if constexpr (KEY_BITS == 6) {
            load_6(key_codes_now[o][s], key_upper[o][s], at, key_place(s), KEY_DIM / KC, s, KTWINS);
          } else {
            key_codes_now[o][s] = load_word(at, key_place(s));
            if constexpr (KEY_BITS > 8)
              key_upper[o][s] = at[16 * (KEY_DIM / KC) + key_place(s) / 4];
          }
        }
      }
    };
    if constexpr (SCORES) {
      if (tile0 < tile1) fetch_keys(tile0);
    }

    // As rest_at, but of the i-th code that the lane reads.
    auto key_rest = [&](int o, int s, int i) {
      if constexpr (KEY_BITS == 6) return i < 2 ? code_bits(i) : i == 2 ? late_bits : ~late_bits;
      return rest_at<KEY_BITS>(key_upper[o], s, i);
    };

    u32 value_codes_now[TPS][HS] = {}, value_upper[TPS][HS] = {};  // none yet: weights are zero
    auto fetch_values = [&](int tile) {
#pragma unroll
      for (int o = 0; o < TPS; o++) {
        const u8* at = values.at<VALUE_TILE>(min(tile + o, tile1 - 1));
#pragma unroll
        for (int i = 0; i < HS; i++) {
          if constexpr (VALUE_BITS == 6) {
            load_6(value_codes_now[o][i], value_upper[o][i], at, value_place(i), VGROUPS, i, VTWINS);
          } else {
            value_codes_now[o][i] = load_word(at, value_place(i));
            if constexpr (VALUE_BITS > 8) value_upper[o][i] = at[16 * VGROUPS + value_place(i) / 4];
          }
        }
      }
    };
    if constexpr (VALUES) {
      __syncwarp();
      for (int i = lane; i < WEIGHTS / 4; i += 32) reinterpret_cast<u32*>(weights)[i] = 0;
      __syncwarp();
    }

    // Matrices: entries are A (channels x groups and tokens), transposed by the load; weights are B,
    // whose columns 4 i + g are group g (or g + 4) of query row i, zero in other groups' rows.
    auto add_matrices = [&](int o) {
      uint4 w[NTV][2];
#pragma unroll
      for (int v = 0; v < NTV; v++) {
        w[v][0] = w[v][1] = make_uint4(0u, 0u, 0u, 0u);
        const __half* at = weights + min(2 * v + (r >> 2), RS - 1) * WEIGHTS_PITCH + o * 16;
        if ((r & 3) == t) {
          w[v][0] = reinterpret_cast<const uint4*>(at)[0];
          w[v][1] = reinterpret_cast<const uint4*>(at)[1];
        }
      }
#pragma unroll
      for (int block = 0; block < VBLOCKS; block++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          u32 rest = rest_at<VALUE_BITS>(value_upper[o], block, i);
          u32 x[4];
          load_matrices(x, row_at<VALUE_BITS>(value_base[0] + block * (VCENT * 128),
                                              word_at<VALUE_BITS>(value_codes_now[o], value_upper[o], block, VTWINS),
                                              code_pick<VALUE_BITS>(i), rest, 2 * i));
#pragma unroll
          for (int v = 0; v < NTV; v++) {
            const uint4& two = w[v][i / 2];
            mma_16816(acc[block][v], x[0], x[1], x[2], x[3], i & 1 ? two.z : two.x, i & 1 ? two.w : two.y);
          }
        }
    };
    auto add_pairs = [&](int o) {
      u32 w[NTV][4];
#pragma unroll
      for (int v = 0; v < NTV; v++) {
        int row = min((8 * v + r) / (2 * TS), RS - 1);
        const __half* at = weights + row * WEIGHTS_PITCH + o * 16 + 2 * t;
        u32 near = *reinterpret_cast<const u32*>(at), far = *reinterpret_cast<const u32*>(at + 8);
        w[v][0] = __byte_perm(near, 0, pick0), w[v][1] = __byte_perm(near, 0, pick1);
        w[v][2] = __byte_perm(far, 0, pick0), w[v][3] = __byte_perm(far, 0, pick1);
      }
      auto entry = [&](int hs, int i) {
        u32 base = value_base[hs % QPB] + (hs / QPB) * (VCENT * 128);
        u32 rest = rest_at<VALUE_BITS>(value_upper[o], hs, i);
        return load_entry<2 * VC>(
            row_at<VALUE_BITS>(base, word_at<VALUE_BITS>(value_codes_now[o], value_upper[o], hs, VTWINS),
                               code_pick<VALUE_BITS>(i), rest, 2 * i));
      };
      // Registers of one entry are the two row halves of a product. Those of a 16-byte entry lie side
      // by side as m16n8k8 takes them; smaller entries of two tokens make one m16n8k16 together.
#pragma unroll
      for (int hs = 0; hs < HS; hs += VREGS == 1 ? 2 : 1)
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
          Entry e = entry(hs, i), f = entry(hs, i + 1);
          if constexpr (VREGS == 1) {
            e.x[1] = hs + 1 < HS ? entry(hs + 1, i).x[0] : 0u;
            f.x[1] = hs + 1 < HS ? entry(hs + 1, i + 1).x[0] : 0u;
          }
#pragma unroll
          for (int v = 0; v < NTV; v++) {
            if constexpr (VREGS <= 2) {
              mma_16816(acc[VREGS == 1 ? hs / 2 : hs][v], e.x[0], e.x[1], f.x[0], f.x[1], w[v][i], w[v][i + 1]);
            } else {
#pragma unroll
              for (int j = 0; j < VREGS / 2; j++) {
                mma_1688(acc[hs * (VREGS / 2) + j][v], e.x[2 * j], e.x[2 * j + 1], w[v][i]);
                mma_1688(acc[hs * (VREGS / 2) + j][v], f.x[2 * j], f.x[2 * j + 1], w[v][i + 1]);
              }
            }
          }
        }
    };

    auto add_values = [&](int o) {
      if constexpr (MATRICES) {
        add_matrices(o);
      } else {
        add_pairs(o);
      }
    };

    // Raw scores lie in scratch [key parts, batch, kv_heads, rows, columns].
    auto raw_scores = [&](int key_part, int j) {
      int row = row0 + (my_combo + j * (8 / ORD)) % RS;
      i64 index = ((static_cast<i64>(key_part) * batch + b) * kv_heads + head) * rows_padded + row;
      return scratch + index * scratch_stride;
    };

    // The queries turned to the middles of the next NOFF tiles, as B fragments: made by the whole
    // warp through shared memory (a lane turns a few channel pairs of all rows, and reads all
    // channels of one column) ...
    Entry query_x[NTK][QSTEPS], query_y[NTK][QSTEPS];
    auto make_queries = [&](int tile) {
      if constexpr (EVERY > 1) load_tile_turns();
      __syncwarp();
#pragma unroll
      for (int k = 0; k < PP; k++) {
        int local = 2 * (lane + 32 * k);
        int slot, lo_lane, index, hi, apart;
        if constexpr (PAIRING == 1) {
          int entry = local / (KC / 2);
          slot = entry / 8, lo_lane = (entry / 2) % 4, hi = entry & 1;
          index = local % (KC / 2), apart = KC / 2;
        } else {
          slot = local / (4 * KC), lo_lane = (local / KC) % 4, hi = 0, index = local % KC, apart = 0;
        }
        float2 angle[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
          angle[i] = ROTATE ? phase_turn(phase[k][i]) : make_float2(1.f, 0.f);
          phase[k][i] += advance[k][i];
        }
#pragma unroll
        for (int row = 0; row < RS; row++) {
          float x[4];
#pragma unroll
          for (int i = 0; i < 2; i++) {
            float f, g;
            if constexpr (EVERY > 1) {
              const Pairs& own = kept_queries[(row * PP + k) * 32 + lane];
              f = to_float(own.first[i]) * query_scale, g = to_float(own.second[i]) * query_scale;
            } else {
              f = first_of[row][k][i], g = second_of[row][k][i];
            }
            x[i] = f * angle[i].x + g * angle[i].y, x[2 + i] = g * angle[i].x - f * angle[i].y;
          }
          u32 start_one = pack_half2(x[0], x[1]), start_two = pack_half2(x[2], x[3]);
#pragma unroll
          for (int o = 0; o < NOFF; o++) {
            u32 one = start_one, two = start_two;
            if (ROTATE && o > 0)
              turn_back(one, two, tile_cos[k][imax(0, o - 1)], tile_sin[k][imax(0, o - 1)]);
            if (KPAIRS / 2 >= 32 * (k + 1) || local < KPAIRS) {
              int combo = o * RS + row, other = PAIRING == 1 ? hi : 1;
              u8* at = mine + 2 * index;
              *reinterpret_cast<u32*>(at + exchange_offset(slot, combo, hi, lo_lane)) = one;
              *reinterpret_cast<u32*>(at + exchange_offset(slot, combo, other, lo_lane) + 2 * apart) = two;
            }
          }
        }
      }
      __syncwarp();
#pragma unroll
      for (int j = 0; j < NTK; j++)
#pragma unroll
        for (int s = 0; s < QSTEPS; s++) {
          int combo = (8 * j + r) / ORD, order = r & (ORD - 1), slot = s ^ (order >> 1);
          query_x[j][s] = load_entry<2 * KC>(exchange + exchange_offset(slot, combo, order & 1, t));
          query_y[j][s] = load_entry<2 * KC>(exchange + exchange_offset(slot, combo, 1 - (order & 1), t));
        }
    };
    // ... or from those before them: a lane holds both channels of its pairs.
    auto turn_queries = [&] {
      if constexpr (ROTATE) {
#pragma unroll
        for (int j = 0; j < NTK; j++)
#pragma unroll
          for (int s = 0; s < QSTEPS; s++)
#pragma unroll
            for (int i = 0; i < KREGS; i++) {
              PairOf pair(query_x[j][s], query_y[j][s], i);
              turn_back(*pair.one, *pair.two, step_cos[s][i], step_sin[s][i]);
            }
      }
    };

    // A turn of the loop takes the scores of a step and the values of the step before: two
    // independent chains, so that one hides the other's latency. The first has no values yet
    // (weights zero), the last no scores (tokens beyond the end).
    const int last = tile0 < tile1 ? tile1 + (VALUES ? TPS : 0) : tile0;
    for (int tile = tile0; tile < last;) {
      if constexpr (SCORES) make_queries(tile);
#pragma unroll 1
      for (int n = 0; n < STEPS && tile < last; n++, tile += TPS) {
        float z[SG][NTK][2];
#pragma unroll
        for (int i = 0; i < SG * NTK * 2; i++) (&z[0][0][0])[i] = 0.f;

        const int column = (tile + my_off) * 16 + r;  // of set 0; set g is 16 NOFF g further
        if constexpr (MODE == 2) {
          // Under way while the values of the step before are added.
#pragma unroll
          for (int g = 0; g < SG; g++)
#pragma unroll
            for (int j = 0; j < NTK; j++)
#pragma unroll
              for (int h = 0; h < 2; h++) {
                int at = min(column + 16 * NOFF * g + 8 * h, stop - 1);
#pragma unroll
                for (int p = 0; p < KEY_PARTS; p++) z[g][j][h] += raw_scores(p, j)[at];
              }
        }
        if constexpr (SCORES) {
#pragma unroll
          for (int o = 0; o < TPS; o++) {
            const int set = o / NOFF;
            if (EVERY == 1 && set > 0 && o % NOFF == 0) make_queries(tile + o);
            float c[NTK][SX][4], d[NTK][4];
#pragma unroll
            for (int j = 0; j < NTK; j++)
#pragma unroll
              for (int i = 0; i < 4; i++) {
                d[j][i] = 0.f;
#pragma unroll
                for (int e = 0; e < SX; e++) c[j][e][i] = 0.f;
              }
            if constexpr (PAIRING == 2) {
              // Groups that cut pairs: the channels go through shared memory into natural order.
              __syncwarp();
#pragma unroll
              for (int s = 0; s < KSTEPS; s++) {
                int slot = s ^ swap;
                bool real = slot < KSLOTS && (slot0 + slot) * 4 + t < KUNITS;
#pragma unroll
                for (int i = 0; i < 4; i++) {  // token half, lo or hi
                  int hi = i & 1, column = ((slot % KSPB) * 8 + hi * 4 + t) * (2 * KC);
                  u32 at = (real ? slot / KSPB : 0) * (KCENT * 128) + column;
                  Entry e = load_entry<2 * KC>(
                      row_at<KEY_BITS>(at, word_at<KEY_BITS>(key_codes_now[o], key_upper[o], s, KTWINS), key_pick[i],
                                       key_rest(o, s, i), 2 * i));
                  const u16* place = natural_place + head * KEY_DIM +
                      (real ? (((slot0 + slot) * 4 + t) * 2 + hi) * KC : 0);
                  u16* row = reinterpret_cast<u16*>(natural) + (r + 8 * (i >> 1)) * NAT_PITCH;
                  if (real) {
#pragma unroll
                    for (int ch = 0; ch < KC; ch++)
                      row[place[ch]] = static_cast<u16>(e.x[ch / 2] >> (16 * (ch & 1)));
                  }
                }
              }
              __syncwarp();
            }
#pragma unroll
            for (int s = 0; s < QSTEPS; s++) {
              Entry x[2], y[2];
              if constexpr (PAIRING == 2) {
                int slot = s ^ swap;
                int at = slot < QSLOTS && slot * 4 + t < KUNITS ? (slot * 4 + t) * KC : 0;
#pragma unroll
                for (int h = 0; h < 2; h++) {
                  const __half* row = natural + (r + 8 * h) * NAT_PITCH + at;
#pragma unroll
                  for (int i = 0; i < KREGS; i++) {
                    x[h].x[i] = reinterpret_cast<const u32*>(row + (r & 1) * (KEY_DIM / 2))[i];
                    y[h].x[i] = reinterpret_cast<const u32*>(row + (1 - (r & 1)) * (KEY_DIM / 2))[i];
                  }
                }
              } else {
                u32 base_x = key_base[s % KSPB] + (s / KSPB) * (KCENT * 128);
                // The other of lo and hi lies four columns away.
                u32 base_y = base_x ^ (8 * KC);
                u32 word = word_at<KEY_BITS>(key_codes_now[o], key_upper[o], s, KTWINS);
#pragma unroll
                for (int h = 0; h < 2; h++) {
                  int x_shift = 4 * h + 2 * (r & 1), y_shift = 4 * h + 2 - 2 * (r & 1);
                  u32 x_rest = key_rest(o, s, 2 * h), y_rest = key_rest(o, s, 2 * h + 1);
                  x[h] = load_entry<2 * KC>(row_at<KEY_BITS>(base_x, word, key_pick[2 * h], x_rest, x_shift));
                  y[h] = load_entry<2 * KC>(row_at<KEY_BITS>(base_y, word, key_pick[2 * h + 1], y_rest, y_shift));
                }
              }
              if constexpr (ROTATE) {
#pragma unroll
                for (int h = 0; h < 2; h++)
#pragma unroll
                  for (int i = 0; i < KREGS; i++) {
                    PairOf pair(x[h], y[h], i);
                    if (s < SLOW_SLOT) {
                      turn_on(*pair.one, *pair.two, turn_cos[h][s][i], turn_sin[h][s][i]);
                    } else {
                      turn_little(*pair.one, *pair.two, turn_sin[h][s][i]);
                    }
                  }
              }
#pragma unroll
              for (int j = 0; j < NTK; j++)
#pragma unroll
                for (int e = 0; e < SX; e++) {
                  const u32 *qx = query_x[j][s ^ (e * SWZ)].x, *qy = query_y[j][s ^ (e * SWZ)].x;
                  float(&first_sum)[4] = c[j][e];
                  float(&second_sum)[4] = SX > 1 ? c[j][e] : d[j];
                  if constexpr (KC == 2) {
                    mma_16816(s & 1 ? second_sum : first_sum, x[0].x[0], x[1].x[0], y[0].x[0], y[1].x[0], qx[0], qy[0]);
                  } else {
#pragma unroll
                    for (int i = 0; i < KREGS; i += 2) {
                      mma_16816(first_sum, x[0].x[i], x[1].x[i], x[0].x[i + 1], x[1].x[i + 1], qx[i], qx[i + 1]);
                      mma_16816(second_sum, y[0].x[i], y[1].x[i], y[0].x[i + 1], y[1].x[i + 1], qy[i], qy[i + 1]);
                    }
                  }
                }
            }
#pragma unroll
            for (int j = 0; j < NTK; j++)
#pragma unroll
              for (int h = 0; h < 2; h++) {
                float even = d[j][2 * h], odd = d[j][2 * h + 1];
#pragma unroll
                for (int e = 0; e < SX; e++)
                  if (SX == 1 || swap / SWZ == e) even += c[j][e][2 * h], odd += c[j][e][2 * h + 1];
                float own = r & 1 ? odd : even;
                // A token's order is one column; its lane shares it with those of the other orders.
                if constexpr (ORD >= 4) {
                  if (((2 * t) & (ORD - 1)) >> 1 != (r & (ORD - 1)) >> 1) own = 0.f;
                  own += __shfl_xor_sync(~0u, own, 1);
                  if constexpr (ORD == 8) own += __shfl_xor_sync(~0u, own, 2);
                }
                if (NOFF == 1 || my_off == o % NOFF) z[set][j][h] = own;
              }
            if (EVERY > 1 && o % NOFF == NOFF - 1 && (STEPS > 1 || set < SG - 1)) turn_queries();
            if constexpr (VALUES) add_values(o);
          }
          fetch_keys(tile + TPS);
        } else {
#pragma unroll
          for (int o = 0; o < TPS; o++) add_values(o);
        }
        if constexpr (VALUES) fetch_values(tile);

        // ---- scores of tokens column, column + 8 for the lane's rows ---------------------------
        if constexpr (MODE == 1) {
#pragma unroll
          for (int g = 0; g < SG; g++)
#pragma unroll
            for (int j = 0; j < NTK; j++)
#pragma unroll
              for (int h = 0; h < 2; h++) {
                int at = column + 16 * NOFF * g + 8 * h;
                if (at < stop && 2 * t % ORD == 0) raw_scores(blockIdx.z, j)[at] = z[g][j][h];
              }
        }
        if constexpr (MODE != 1) {
          float gain[SG][2];
          bool rises = false;
#pragma unroll
          for (int g = 0; g < SG; g++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
              const int at = column + 16 * NOFF * g + 8 * h;
              bool seen = at < stop;
              gain[g][h] = 1.f;
              if constexpr (HAS_MASK) seen = seen && mask[b * mask_stride + min(at, stop - 1)] != 0;
              if constexpr (HAS_GAIN) {
                i64 place = (static_cast<i64>(b) * kv_heads + head) * gain_stride + min(at, stop - 1);
                if (value_gain != nullptr) gain[g][h] = __half2float(value_gain[place]);
                if (key_gain != nullptr) {
#pragma unroll
                  for (int j = 0; j < NTK; j++) z[g][j][h] *= __half2float(key_gain[place]);
                }
              }
#pragma unroll
              for (int j = 0; j < NTK; j++) {
                if constexpr (SOFTCAP) {  // query_scale holds 1 / cap, `cap` the factor to base 2
                  float e = exp2_fast(-2.885390081777927f * fabsf(z[g][j][h]));
                  z[g][j][h] = copysignf(cap * (1.f - e) / (1.f + e), z[g][j][h]);
                }
                if (!seen || at < row_begin[j]) z[g][j][h] = __int_as_float(0xff800000);
                rises |= z[g][j][h] > peak[j] + 8.f;
              }
            }
          // Weights may reach 2^8 before the maximum follows: rescaling stays out of the hot path.
          if (__any_sync(~0u, rises)) {
            float factor[NTK];
#pragma unroll
            for (int j = 0; j < NTK; j++) {
              float top = peak[j];
#pragma unroll
              for (int g = 0; g < SG; g++) top = fmaxf(top, fmaxf(z[g][j][0], z[g][j][1]));
              for (int bit = 4; bit < 32; bit <<= 1) top = fmaxf(top, __shfl_xor_sync(~0u, top, bit));
              if constexpr (SAME_ROW_1) top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
              if constexpr (SAME_ROW_2) top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
              factor[j] = exp2_fast(peak[j] - top);
              peak[j] = top, sum[j] *= factor[j];
            }
#pragma unroll
            for (int v = 0; v < NTV; v++) {
              // Column 8 v + 2 t belongs to this row; a lane that holds its factor:
              int row = (8 * v + 2 * t) / (2 * TS);
              int j = row * ORD / 8, holder = (row * ORD % 8) / 2;
              float f = 0.f;
#pragma unroll
              for (int i = 0; i < NTK; i++) {
                float candidate = __shfl_sync(~0u, factor[i], holder);
                if (i == j) f = candidate;
              }
#pragma unroll
              for (int k = 0; k < MT; k++)
#pragma unroll
                for (int e = 0; e < 4; e++) acc[k][v][e] *= f;
            }
          }
          __syncwarp();
#pragma unroll
          for (int g = 0; g < SG; g++)
#pragma unroll
            for (int j = 0; j < NTK; j++) {
              float p0 = exp2_fast(z[g][j][0] - peak[j]), p1 = exp2_fast(z[g][j][1] - peak[j]);
              sum[j] += p0 + p1;
              int row = (my_combo + j * (8 / ORD)) % RS;
              // Tokens 2s, 2s + 1, 2s + 8, 2s + 9 are those of one code word: at s, s + 4, ... for matrices.
              const int place = MATRICES ? 4 * (r & 1) + (r >> 1) : r;
              __half* at = weights + row * WEIGHTS_PITCH + (g * NOFF + my_off) * 16 + place;
              at[0] = __float2half_rn(p0 * gain[g][0]), at[8] = __float2half_rn(p1 * gain[g][1]);
            }
          __syncwarp();
        }
      }
    }

    // ---- what this unit found ---------------------------------------------------------------
    if constexpr (MODE != 1) {
      // Where it goes is worked out anew, hidden from the compiler, which would keep it in
      // registers all through the loop.
      int this_unit = unit, this_warp = warp;
      asm volatile("" : "+r"(this_unit), "+r"(this_warp));
      const int to_b = this_unit / splits, leader = this_warp / team * team, member = this_warp - leader;
      const i64 part_row = (static_cast<i64>(to_b) * kv_heads + head) * splits + this_unit % splits;
#pragma unroll
      for (int j = 0; j < NTK; j++) {
        float l = 2 * t % ORD == 0 ? sum[j] : 0.f;  // lanes of other orders hold the same again
        for (int bit = 4; bit < 32; bit <<= 1) l += __shfl_xor_sync(~0u, l, bit);
        if constexpr (SAME_ROW_1) l += __shfl_xor_sync(~0u, l, 1);
        if constexpr (SAME_ROW_2) l += __shfl_xor_sync(~0u, l, 2);
        const int combo = my_combo + j * (8 / ORD);
        if (r == 0 && 2 * t % ORD == 0 && combo < RS) team_ml[warp][combo] = make_float2(peak[j], l);
      }
      float* buffer = reinterpret_cast<float*>(mine);
      constexpr int WIDTH = VBLOCKS * NB * VC;
      const int width = min(WIDTH, VALUE_DIM - block0 * NB * VC);
#pragma unroll
      for (int v = 0; v < NTV; v++) {
        team_sync();
        if constexpr (MATRICES) {
          // Columns 2t, 2t + 1 are two groups, of query row t / 2; rows r and r + 8 channel r of a
          // group and of the fourth after it.
#pragma unroll
          for (int block = 0; block < VBLOCKS; block++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
              int group = block * NB + (e / 2) * 4 + (2 * t) % 4 + e % 2;
              if (block0 * NB + group < VGROUPS)
                buffer[(t / 2) * OUT_PITCH + group * VC + r] = acc[block][v][e];
            }
        } else {
#pragma unroll
          for (int u = 0; u < TS; u++) {
            if (t % TS == u) {
              int row = ((2 * t) / (2 * TS)) % RPT;
#pragma unroll
              for (int hs = 0; hs < HS; hs++) {
                int column = (r + 8 * (hs % QPB) + ST * u) & (NB - 1);
                int group = (hs / QPB) * NB + column;
                if ((block0 * NB + group) < VGROUPS) {
                  float* at = buffer + row * OUT_PITCH + group * VC;
                  if constexpr (VREGS == 1) {
                    const float* x = acc[hs / 2][v] + (hs & 1) * 2;
                    float2* two = reinterpret_cast<float2*>(at);
                    float2 had = u == 0 ? make_float2(0.f, 0.f) : *two;
                    *two = make_float2(had.x + x[0], had.y + x[1]);
                  } else {
                    // A product's four results are the channels of two registers of an entry.
#pragma unroll
                    for (int i = 0; i < VREGS / 2; i++) {
                      const float* x = acc[hs * (VREGS / 2) + i][v];
                      float4* four = reinterpret_cast<float4*>(at) + i;
                      float4 had = u == 0 ? make_float4(0.f, 0.f, 0.f, 0.f) : *four;
                      *four = make_float4(had.x + x[0], had.y + x[1], had.z + x[2], had.w + x[3]);
                    }
                  }
                }
              }
            }
            __syncwarp();
          }
        }
        team_sync();
        auto found = [&](int w) {
          return reinterpret_cast<const float*>(smem + KEY_SMEM + VALUE_SMEM + w * WARP_SMEM);
        };
#pragma unroll 4
        for (int item = member * 32 + lane; item < RPT * WIDTH; item += team * 32) {
          const int row = item / WIDTH, i = item % WIDTH, own = v * RPT + row, index = row0 + own;
          if (own >= RS || i >= width) continue;
          float2 ml = team_ml[leader][own];
          float x = found(leader)[row * OUT_PITCH + i];
          if (team > 1) {
            const float start = ml.x;
#pragma unroll
            for (int w = 1; w < WARPS; w++)
              if (w < team) ml.x = fmaxf(ml.x, team_ml[leader + w][own].x);
            float factor = exp2_fast(start - ml.x);
            x *= factor, ml.y *= factor;
#pragma unroll
            for (int w = 1; w < WARPS; w++)
              if (w < team) {
                float2 other = team_ml[leader + w][own];
                factor = exp2_fast(other.x - ml.x);
                x += factor * found(leader + w)[row * OUT_PITCH + i], ml.y += factor * other.y;
              }
          }
          const int channel = block0 * NB * VC + i;
          if (out == nullptr) {
            const i64 at = part_row * rows_padded + index;
            part_out[at * VALUE_DIM + channel] = x;
            if (channel == 0) part_ml[at] = ml;
          } else if (index < rows_all) {
            // A row that may see nothing gets zeros, as SDPA's kernels give.
            int of = index, token = 0;
            if (query_length > 1) of = index / query_length, token = index % query_length;
            out[to_b * out_b + (head * queries_per_head + of) * out_h + token * out_l +
                value_channels[head * VALUE_DIM + channel]] = from_float(ml.y > 0.f ? x / ml.y : 0.f);
          }
        }
      }
      team_sync();
      if constexpr (SCORES) {
        // The buffer lay over the queries, whose padding must be zero.
        if constexpr (PADDED)
          for (int i = lane; i < EXCHANGE / 4; i += 32) reinterpret_cast<u32*>(mine)[i] = 0;
      }
    }
  }
}
