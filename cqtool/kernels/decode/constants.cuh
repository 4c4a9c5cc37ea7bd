// What follows from the -D options of decode.cu, all of which config.py gives: MODE (0 both, 1 scores,
// 2 values), KEY_DIM, VALUE_DIM, KEY_CHANNELS, KEY_BITS, VALUE_CHANNELS, VALUE_BITS, ROWS (query rows
// a warp serves), PAIRING (0 paired, 1 closed, 2 scatter: layout.py), ROTATE, SLOW, DTYPE, SOFTCAP,
// HAS_MASK, HAS_GAIN, PAGED, WARPS, KEY_PARTS, VALUE_PARTS (passes over parts of the channels), and
// what was found by measurement: KORD, SHARED_ORDERS, TILES, EVERY, VSEL, VCOPIES, VMATRICES.
#pragma once
#include "../common.cuh"

constexpr int RS = ROWS;
// Rows of `turns`: offsets 0 to 15 within a tile, then 16, 32, ... 112.
constexpr int TURN_ROWS = 23;
constexpr float NEVER = -1e30f;
__host__ __device__ constexpr int imax(int a, int b) { return a > b ? a : b; }
__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// ---- keys -----------------------------------------------------------------------------------
constexpr int KC = KEY_CHANNELS, KREGS = KC / 2;
constexpr int KCENT = 1 << KEY_BITS;
constexpr int KUNITS = KEY_DIM / (2 * KC);
constexpr int KSLOTS_ALL = ceil_div(KUNITS, 4);
constexpr int KSLOTS = ceil_div(KSLOTS_ALL, KEY_PARTS);
constexpr int KSPB = 8 / KC;  // slots whose entries share a table row
// ORD orders are columns of their own; SX times as many read the same B registers, slots exchanged.
constexpr int ORD = KORD, SWZ = ORD / 2, SX = SHARED_ORDERS, SWT = SWZ * SX;
constexpr int KSTEPS = ceil_div(KSLOTS, SWT) * SWT;
constexpr int KBLOCKS = ceil_div(KSLOTS, KSPB);
constexpr int KEY_TABLE = KBLOCKS * KCENT * 128;
constexpr int KEY_TILE = 2 * (KEY_DIM / KC) * KEY_BITS;
// Slots, from the first on, whose words of 6-bit codes are loaded two at a time (place_of_6).
constexpr int KTWINS = KEY_BITS == 6 && KEY_PARTS == 1 ? KUNITS / 8 * 2 : 0;
constexpr int NOFF = imax(1, 8 / ORD / RS);
constexpr int NTK = imax(1, RS * ORD / 8);
constexpr int COMBOS = NOFF * RS;
constexpr int SG = imax(1, TILES / NOFF);  // sets of B fragments a step needs
constexpr int TPS = SG * NOFF;
// Whether the lanes t ^ 1, and t ^ 2, hold scores of the same query row.
constexpr bool SAME_ROW_1 = ORD >= 4 || (ORD == 2 && RS == 1);
constexpr bool SAME_ROW_2 = ORD == 8 || (ORD == 2 && RS <= 2) || (ORD == 4 && RS == 1);
constexpr int STEPS = imax(1, EVERY / SG);  // between makings of the queries
// Slots of the queries: a part's own, but all where a part's channels lie anywhere.
constexpr int QSLOTS = PAIRING == 2 ? KSLOTS_ALL : KSLOTS;
constexpr int QSTEPS = ceil_div(QSLOTS, SWT) * SWT;
// Slots from here on turn so little within a tile that their cosines are 1 (turns_slowly in layout.py).
constexpr int SLOW_SLOT = SLOW ? QSTEPS / 2 : QSTEPS;
constexpr int KPAIRS = QSLOTS * 4 * KC;  // padding included
constexpr int PP = ceil_div(KPAIRS / 2, 32);
static_assert(NTK * 8 == COMBOS * ORD, "columns");
static_assert(EVERY == 1 || EVERY % SG == 0, "the queries are made anew at the start of a step");
static_assert(!SLOW || (QSTEPS / 2) % SWT == 0, "slots of one half stay in it");
static_assert(KEY_BITS != 6 || SWT == 1, "twins are slots of one order");
static_assert(KEY_PARTS == 1 || KSLOTS % KSPB == 0, "parts are whole tables");

// ---- values ---------------------------------------------------------------------------------
constexpr int VC = VALUE_CHANNELS, VREGS = VC / 2;
constexpr int VCENT = 1 << VALUE_BITS;
constexpr int VGROUPS = VALUE_DIM / VC;
constexpr int NB = 64 / VC;  // groups whose entries share a table row
constexpr int VBLOCKS_ALL = ceil_div(VGROUPS, NB);
constexpr int VBLOCKS = ceil_div(VBLOCKS_ALL, VALUE_PARTS);
constexpr int QPB = NB / 8;
constexpr int HS = VBLOCKS * QPB;
// Entries of 8 channels are read as matrices, where the second copy of the table fits.
constexpr bool MATRICES = VMATRICES;
// Row tiles: 16 pairs of channels, or one channel of 8 groups.
constexpr int MT = MATRICES ? VBLOCKS : VREGS >= 2 ? HS * VREGS / 2 : ceil_div(HS, 2);
constexpr int TS = VSEL, ST = NB / TS;
constexpr int NTV = imax(1, RS * TS * 2 / 8);
constexpr int RPT = 4 / TS;  // rows a column tile of the values holds
constexpr int VALUE_TABLE = VBLOCKS * VCENT * 128;
constexpr int VALUE_TILE = 2 * VGROUPS * VALUE_BITS;
// As KTWINS, of blocks; a part of several has them if all of its blocks are such.
constexpr bool VEVEN = VBLOCKS % 2 == 0 && VGROUPS % 16 == 0;
constexpr int VTWINS = VALUE_BITS != 6 ? 0 : VALUE_PARTS == 1 ? VGROUPS / 16 * 2 : VEVEN ? VBLOCKS : 0;
static_assert(NTV * 4 == imax(4, RS * TS), "value columns");
static_assert(!MATRICES || (VC == 8 && VSEL == 2 && VCOPIES == 2), "a matrix: 4 groups of 2 tokens");

// ---- shared memory --------------------------------------------------------------------------
constexpr bool SCORES = MODE != 2, VALUES = MODE != 1;
constexpr int KEY_SMEM = SCORES ? KEY_TABLE : 0;
constexpr int VALUE_SMEM = VALUES ? VALUE_TABLE * VCOPIES : 0;
constexpr int EXCHANGE = SCORES ? QSTEPS * COMBOS * 16 * KC : 0;
constexpr bool PADDED = KUNITS % 4 != 0 || QSTEPS != QSLOTS || KSLOTS * KEY_PARTS != KSLOTS_ALL;
constexpr int OUT_PITCH = VALUE_DIM + (MATRICES ? 8 : RPT > 1 ? 16 : 0);  // floats; keeps lanes apart
constexpr int OUT_BUFFER = VALUES ? RPT * OUT_PITCH * 4 : 0;
constexpr int UNION = imax(EXCHANGE, OUT_BUFFER);
constexpr int WEIGHTS_PITCH = TPS * 16 + 8;  // halves
constexpr int WEIGHTS = VALUES ? RS * WEIGHTS_PITCH * 2 : 0;
constexpr int NAT_PITCH = KEY_DIM + 8;  // halves
constexpr int NATURAL = SCORES && PAIRING == 2 ? 16 * NAT_PITCH * 2 : 0;
// Queries as they came, where they are needed time and again: of each row and lane, two pairs.
struct __align__(4 * sizeof(element)) Pairs {
  element first[2], second[2];
};
constexpr int RAW = SCORES && EVERY > 1 ? RS * PP * 32 * sizeof(Pairs) : 0;
constexpr int WARP_SMEM = (UNION + RAW + WEIGHTS + NATURAL + 15) / 16 * 16;
