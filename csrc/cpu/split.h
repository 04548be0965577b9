// float32 products on the matrix unit of Intel's AMX, to float32's accuracy.
//
// The unit multiplies bfloat16 and adds in float32, sixteen times as fast as the vector units multiply float32. A float32 is the sum
// of three bfloat16, high + middle + low, exactly (24 bits are 8 + 8 + 8). Of the nine products of two such sums six are computed;
// the other three are smaller than 2^-26 of the product, less than rounding it once would cost (Henry, Tang, Heinecke, "Leveraging
// the bfloat16 artificial intelligence datatype for higher-precision computations", 2019). 32 terms go through the unit before they
// meet the running sum, so sums lose fewer digits than in a loop over k.
//
// What the split cannot hold:
//   Inf, NaN        Inf * 0 of a lower part is NaN. A tile in which a NaN appears is computed once more from the whole values, so
//                   that results are what they would be without the split.
//   tiny numbers    the unit reads what is below 2^-126 as zero, lower parts too: a value below 2^-103 loses digits at its end.
//
// Layouts, in tiles of 16 rows of 64 bytes:
//   left factor   [row tile of 16 rows][k block of 32][part][16 rows][32 k]
//   right factor  [panel of 32 columns][k block of 32][part][half of 16 columns][16 pairs of k][16 columns][2 k]
// Rows, columns and k beyond the matrix are zeros.
#pragma once

#include "gemm.h"

namespace fastseq::FS_ISA {
namespace {

template <class T>
inline constexpr bool has_split_products = FS_MATRIX_UNIT && sizeof(T) == 4;

inline constexpr int64_t split_depth = 32;                                   // k of a block
inline constexpr int64_t split_rows = 16;                                    // rows of a tile
inline constexpr int64_t split_parts = 3;                                    // high, middle, low
inline constexpr int64_t tile_elements = split_rows * split_depth;           // of one part
inline constexpr int64_t left_block_elements = split_parts * tile_elements;  // of one row tile and k block
inline constexpr int64_t right_block_elements = 2 * left_block_elements;     // of one panel and k block
inline constexpr int64_t split_panel_width = panel_width<float>;             // 32 columns

FS_INLINE int64_t split_blocks(int64_t depth) { return (depth + split_depth - 1) / split_depth; }
FS_INLINE int64_t row_tiles(int64_t rows) { return (rows + split_rows - 1) / split_rows; }

// The left factor. Rows are taken two tiles at a time, so there is an even number of tiles.
struct SplitRows {
  uint16_t* data;
  int64_t k_blocks;

  FS_INLINE uint16_t* at(int64_t row_tile, int64_t k_block) const {
    return data + (row_tile * k_blocks + k_block) * left_block_elements;
  }
  static int64_t size(int64_t rows, int64_t depth) {
    return round_up(row_tiles(rows), 2) * split_blocks(depth) * left_block_elements;
  }
};

// The right factor.
struct SplitPanels {
  uint16_t* data;
  int64_t k_blocks;

  FS_INLINE uint16_t* at(int64_t panel, int64_t k_block) const {
    return data + (panel * k_blocks + k_block) * right_block_elements;
  }
  static int64_t size(int64_t columns, int64_t depth) {
    return (columns + split_panel_width - 1) / split_panel_width * split_blocks(depth) * right_block_elements;
  }
};

FS_INLINE uint16_t* split_place(SplitRows matrix, int64_t row, int64_t k) {
  return matrix.at(row / split_rows, k / split_depth) + row % split_rows * split_depth + k % split_depth;
}

#if FS_MATRIX_UNIT

static_assert(split_panel_width == 32, "a panel is two tiles wide");

// Sets the unit up for tiles of 16 rows of 64 bytes while it lives.
class TileMode {
  struct alignas(64) Configuration {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  };

 public:
  explicit TileMode(bool wanted = true) : on_(wanted) {
    Configuration configuration;
    // The compiler's own function says that eight bytes are read, and the rest may never be written.
    if (on_) asm volatile("ldtilecfg %0" : : "m"(configuration));
  }
  ~TileMode() {
    if (on_) _tile_release();
  }
  TileMode(const TileMode&) = delete;
  TileMode& operator=(const TileMode&) = delete;

 private:
  bool on_;
};

// --- Splitting

// The parts of sixteen values as the upper halves of float32 words, whose lower halves are zero but for the last part's.
struct SplitVector {
  __m512i part[split_parts];
};

FS_NOINLINE SplitVector split_special(__m512 value) {
  // Rounding would carry these over to infinity, or is not defined: cut the finite ones off instead of rounding, and let
  // the first part of the others be all there is. A NaN's top bit of the fraction is set, lest cutting makes it an infinity.
  alignas(64) float lane[16];
  alignas(64) uint32_t parts[split_parts][16];
  _mm512_store_ps(lane, value);
  for (int i = 0; i < 16; ++i) {
    uint32_t bits;
    memcpy(&bits, &lane[i], 4);
    uint32_t size = bits & 0x7fffffffu;
    float rest = lane[i];
    if (size >= 0x7f800000u) {
      parts[0][i] = (size > 0x7f800000u ? bits | 0x00400000u : bits) & 0xffff0000u;
      parts[1][i] = parts[2][i] = 0;
      continue;
    }
    for (int part = 0; part < split_parts; ++part) {
      memcpy(&bits, &rest, 4);
      bits = (size >= 0x7f7f8000u ? bits : bits + 0x8000u) & 0xffff0000u;
      float taken;
      memcpy(&taken, &bits, 4);
      parts[part][i] = bits;
      rest -= taken;
    }
  }
  SplitVector result;
  for (int part = 0; part < split_parts; ++part) result.part[part] = _mm512_load_si512(parts[part]);
  return result;
}

FS_INLINE SplitVector split_vector(__m512 value) {
  const __m512i upper = _mm512_set1_epi32((int)0xffff0000), half = _mm512_set1_epi32(0x8000);
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff), largest = _mm512_set1_epi32(0x7f7f7fff);
  __m512i bits = _mm512_castps_si512(value);
  if (__builtin_expect(_mm512_cmpgt_epi32_mask(_mm512_and_si512(bits, magnitude), largest) != 0, 0))
    return split_special(value);
  SplitVector split;
  split.part[0] = _mm512_and_si512(_mm512_add_epi32(bits, half), upper);
  __m512 rest = _mm512_sub_ps(value, _mm512_castsi512_ps(split.part[0]));
  split.part[1] = _mm512_and_si512(_mm512_add_epi32(_mm512_castps_si512(rest), half), upper);
  rest = _mm512_sub_ps(rest, _mm512_castsi512_ps(split.part[1]));
  split.part[2] = _mm512_add_epi32(_mm512_castps_si512(rest), half);
  return split;
}

// The upper halves of two vectors one behind the other.
FS_INLINE __m512i join_upper_halves(__m512i first, __m512i second) {
  alignas(64) static constexpr uint16_t index[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                                     33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  return _mm512_permutex2var_epi16(first, _mm512_load_si512(index), second);
}

// The upper halves of two vectors in turns: lane by lane a pair of k.
FS_INLINE __m512i pair_upper_halves(__m512i even, __m512i odd) {
  return _mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_srli_epi32(even, 16), odd);
}

FS_INLINE __m512 load_lanes(const float* source, int64_t count) { return (__m512)load_partial(source, count < 0 ? 0 : count); }

// Writes 32 values of one row of a left factor; target is the row in the first part's tile.
FS_INLINE void store_split_row(__m512 first, __m512 second, uint16_t* target) {
  SplitVector a = split_vector(first), b = split_vector(second);
#pragma GCC unroll 3
  for (int part = 0; part < split_parts; ++part)
    _mm512_storeu_si512(target + part * tile_elements, join_upper_halves(a.part[part], b.part[part]));
}

// Writes sixteen values of one row, those from k % 32 = half * 16 on.
FS_INLINE void store_split_half_row(__m512 value, uint16_t* target) {
  SplitVector a = split_vector(value);
#pragma GCC unroll 3
  for (int part = 0; part < split_parts; ++part)
    _mm256_storeu_si256((__m256i*)(target + part * tile_elements), _mm512_cvtepi32_epi16(_mm512_srli_epi32(a.part[part], 16)));
}

// One row of a left factor, `depth` values.
FS_INLINE void split_row(const float* source /* [depth] */, int64_t depth, SplitRows target, int64_t row) {
  uint16_t* to = target.at(row / split_rows, 0) + row % split_rows * split_depth;
  int64_t k = 0;
  for (; k + split_depth <= depth; k += split_depth, to += left_block_elements)
    store_split_row(_mm512_loadu_ps(source + k), _mm512_loadu_ps(source + k + 16), to);
  if (k < depth) store_split_row(load_lanes(source + k, depth - k), load_lanes(source + k + 16, depth - k - 16), to);
}

FS_INLINE void zero_split_row(SplitRows target, int64_t row) {
  uint16_t* to = target.at(row / split_rows, 0) + row % split_rows * split_depth;
  for (int64_t block = 0; block < target.k_blocks; ++block, to += left_block_elements)
    for (int part = 0; part < split_parts; ++part) _mm512_storeu_si512(to + part * tile_elements, _mm512_setzero_si512());
}

// One k block of one row tile from the columns of a matrix: tile row r is column r. row(k) is a pointer to `columns` values,
// or NULL for zeros.
template <class Row>
FS_INLINE void split_columns(Row row, int64_t depth, int64_t columns, uint16_t* target) {
  Vec<float> words[split_parts][16];
#pragma GCC unroll 2
  for (int64_t pair = 0; pair < 16; ++pair) {
    SplitVector split[2];
    for (int64_t i = 0; i < 2; ++i) {
      const float* source = 2 * pair + i < depth ? row(2 * pair + i) : nullptr;
      split[i] = split_vector(source ? load_lanes(source, columns) : _mm512_setzero_ps());
    }
    for (int part = 0; part < split_parts; ++part)
      words[part][pair] = (Vec<float>)pair_upper_halves(split[0].part[part], split[1].part[part]);
  }
  for (int part = 0; part < split_parts; ++part) {
    transpose<float>(words[part]);
    for (int64_t column = 0; column < 16; ++column)
      _mm512_storeu_si512(target + part * tile_elements + column * split_depth, (__m512i)words[part][column]);
  }
}

// One k block of a panel from the rows of a matrix. row(k) as above.
template <class Row>
FS_INLINE void split_panel_rows(Row row, int64_t depth, int64_t columns, uint16_t* target) {
  for (int64_t pair = 0; pair < 16; ++pair) {
    const float* source[2];
    for (int64_t i = 0; i < 2; ++i) source[i] = 2 * pair + i < depth ? row(2 * pair + i) : nullptr;
#pragma GCC unroll 2
    for (int64_t half = 0; half < 2; ++half) {
      SplitVector split[2];
#pragma GCC unroll 2
      for (int64_t i = 0; i < 2; ++i)
        split[i] = split_vector(source[i] ? load_lanes(source[i] + half * 16, columns - half * 16) : _mm512_setzero_ps());
#pragma GCC unroll 3
      for (int part = 0; part < split_parts; ++part)
        _mm512_storeu_si512(target + (part * 2 + half) * tile_elements + pair * 32,
                            pair_upper_halves(split[0].part[part], split[1].part[part]));
    }
  }
}

// A panel from a matrix with the summed index last: weights in forward.
FS_NOINLINE void split_panel_transposed(const float* w /* [columns, depth], row stride w_stride */, int64_t w_stride,
                                        int64_t columns, int64_t depth, uint16_t* target /* [k block] */) {
  for (int64_t k = 0; k < depth; k += split_depth, target += right_block_elements)
    for (int64_t half = 0; half < 2; ++half) {
      Vec<float> words[split_parts][16];
      for (int64_t column = 0; column < 16; ++column) {
        int64_t count = half * 16 + column < columns ? depth - k : 0;
        const float* source = w + (half * 16 + column) * w_stride + k;
        SplitVector a = split_vector(load_lanes(source, count)), b = split_vector(load_lanes(source + 16, count - 16));
        for (int part = 0; part < split_parts; ++part)
          words[part][column] = (Vec<float>)join_upper_halves(a.part[part], b.part[part]);
      }
      for (int part = 0; part < split_parts; ++part) {
        transpose<float>(words[part]);
        for (int64_t pair = 0; pair < 16; ++pair)
          _mm512_storeu_si512(target + (part * 2 + half) * tile_elements + pair * 32, (__m512i)words[part][pair]);
      }
    }
}

// --- Products

// Tiles hold sums that go on from block to block, so each of the six products would round them at their full size. The five small ones
// therefore come first, over all of K, while the sums are small themselves.

// c[32][32] = two row tiles times a panel.
FS_NOINLINE void split_tile_pair(const uint16_t* a, int64_t a_tile_step, const uint16_t* b, int64_t k_blocks, float* c,
                                 int64_t c_stride) {
  constexpr int64_t middle = tile_elements, low = 2 * tile_elements;
  const uint16_t* a2 = a + a_tile_step;
  const int64_t c_bytes = c_stride * (int64_t)sizeof(float);
  float* c2 = c + split_rows * c_stride;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
#define FS_FOUR_PRODUCTS   \
  _tile_dpbf16ps(0, 4, 6); \
  _tile_dpbf16ps(1, 4, 7); \
  _tile_dpbf16ps(2, 5, 6); \
  _tile_dpbf16ps(3, 5, 7);
  for (int64_t k = 0; k < k_blocks; ++k) {
    const uint16_t *left = a + k * left_block_elements, *left2 = a2 + k * left_block_elements;
    const uint16_t* right = b + k * right_block_elements;
    _tile_loadd(4, left + low, 64);
    _tile_loadd(6, right, 64);
    _tile_loadd(7, right + tile_elements, 64);
    _tile_loadd(5, left2 + low, 64);
    FS_FOUR_PRODUCTS  // low high
        _tile_loadd(4, left + middle, 64);
    _tile_loadd(5, left2 + middle, 64);
    FS_FOUR_PRODUCTS  // middle high
        _tile_loadd(6, right + 2 * middle, 64);
    _tile_loadd(7, right + 3 * middle, 64);
    FS_FOUR_PRODUCTS  // middle middle
        _tile_loadd(4, left, 64);
    _tile_loadd(5, left2, 64);
    FS_FOUR_PRODUCTS  // high middle
        _tile_loadd(6, right + 4 * middle, 64);
    _tile_loadd(7, right + 5 * middle, 64);
    FS_FOUR_PRODUCTS  // high low
  }
  for (int64_t k = 0; k < k_blocks; ++k) {
    _tile_loadd(4, a + k * left_block_elements, 64);
    _tile_loadd(6, b + k * right_block_elements, 64);
    _tile_loadd(7, b + k * right_block_elements + tile_elements, 64);
    _tile_loadd(5, a2 + k * left_block_elements, 64);
    FS_FOUR_PRODUCTS  // high high
  }
#undef FS_FOUR_PRODUCTS
  _tile_stored(0, c, c_bytes);
  _tile_stored(1, c + 16, c_bytes);
  _tile_stored(2, c2, c_bytes);
  _tile_stored(3, c2 + 16, c_bytes);
}

// The same for one row tile, with the same order of sums: c[16][32].
FS_NOINLINE void split_tile(const uint16_t* a, const uint16_t* b, int64_t k_blocks, float* c, int64_t c_stride) {
  constexpr int64_t middle = tile_elements, low = 2 * tile_elements;
  const int64_t c_bytes = c_stride * (int64_t)sizeof(float);
  _tile_zero(0);
  _tile_zero(1);
#define FS_TWO_PRODUCTS(left, right, second) \
  _tile_dpbf16ps(0, left, right);            \
  _tile_dpbf16ps(1, left, second);
  for (int64_t k = 0; k < k_blocks; ++k) {
    const uint16_t *left = a + k * left_block_elements, *right = b + k * right_block_elements;
    _tile_loadd(3, left + low, 64);
    _tile_loadd(4, right, 64);
    _tile_loadd(5, right + tile_elements, 64);
    FS_TWO_PRODUCTS(3, 4, 5)  // low high
    _tile_loadd(3, left + middle, 64);
    FS_TWO_PRODUCTS(3, 4, 5)  // middle high
    _tile_loadd(6, right + 2 * middle, 64);
    _tile_loadd(7, right + 3 * middle, 64);
    FS_TWO_PRODUCTS(3, 6, 7)  // middle middle
    _tile_loadd(2, left, 64);
    FS_TWO_PRODUCTS(2, 6, 7)  // high middle
    _tile_loadd(4, right + 4 * middle, 64);
    _tile_loadd(5, right + 5 * middle, 64);
    FS_TWO_PRODUCTS(2, 4, 5)  // high low
  }
  for (int64_t k = 0; k < k_blocks; ++k) {
    _tile_loadd(2, a + k * left_block_elements, 64);
    _tile_loadd(4, b + k * right_block_elements, 64);
    _tile_loadd(5, b + k * right_block_elements + tile_elements, 64);
    FS_TWO_PRODUCTS(2, 4, 5)  // high high
  }
#undef FS_TWO_PRODUCTS
  _tile_stored(0, c, c_bytes);
  _tile_stored(1, c + 16, c_bytes);
}

FS_INLINE bool has_nan(const float* c /* [rows][32] */, int64_t c_stride, int64_t rows) {
  __mmask16 found = 0;
  for (int64_t row = 0; row < rows; ++row, c += c_stride) {
    __m512 first = _mm512_loadu_ps(c), second = _mm512_loadu_ps(c + 16);
    found |= _mm512_cmp_ps_mask(first, second, _CMP_UNORD_Q);
  }
  return found;
}

// The sums of one tile that are NaN once more, from the whole values: parts add up to them exactly. The others keep their bits.
FS_NOINLINE void repair_tile(const uint16_t* a, const uint16_t* b, int64_t k_blocks, float* c, int64_t c_stride) {
  auto whole = [](const uint16_t* part, int64_t step) {
    float sum = 0;
    for (int64_t i = split_parts - 1; i >= 0; --i) {
      uint32_t bits = (uint32_t)part[i * step] << 16;
      float value;
      memcpy(&value, &bits, 4);
      sum += value;
    }
    return sum;
  };
  for (int64_t row = 0; row < split_rows; ++row) {
    __mmask16 wrong[2];
    for (int half = 0; half < 2; ++half) {
      __m512 found = _mm512_loadu_ps(c + row * c_stride + half * 16);
      wrong[half] = _mm512_cmp_ps_mask(found, found, _CMP_UNORD_Q);
    }
    if (!(wrong[0] | wrong[1])) continue;
    __m512 sum[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    for (int64_t k = 0; k < k_blocks * split_depth; ++k) {
      float left = whole(a + k / split_depth * left_block_elements + row * split_depth + k % split_depth, tile_elements);
      const uint16_t* right = b + k / split_depth * right_block_elements + k % split_depth / 2 * 32;
      for (int half = 0; half < 2; ++half) {
        __m512 value = _mm512_setzero_ps();
        for (int64_t part = split_parts - 1; part >= 0; --part) {
          __m512i pairs = _mm512_loadu_si512(right + (part * 2 + half) * tile_elements);
          __m512i words = k % 2 ? _mm512_and_si512(pairs, _mm512_set1_epi32((int)0xffff0000)) : _mm512_slli_epi32(pairs, 16);
          value = _mm512_add_ps(value, _mm512_castsi512_ps(words));
        }
        sum[half] = _mm512_fmadd_ps(_mm512_set1_ps(left), value, sum[half]);
      }
    }
    for (int half = 0; half < 2; ++half) _mm512_mask_storeu_ps(c + row * c_stride + half * 16, wrong[half], sum[half]);
  }
}

// c[16 or 32][32] = rows of the left factor, from row_tile on, times a panel, over all k.
FS_INLINE void multiply_split_tiles(SplitRows left, int64_t row_tile, int64_t tiles /* 1 or 2 */, SplitPanels right,
                                    int64_t panel, float* c, int64_t c_stride) {
  // A tile runs over this many blocks before its sums meet what was there: short sums keep more digits.
  constexpr int64_t longest = 1024 / split_depth;
  alignas(64) float part[2 * split_rows * split_panel_width];
  for (int64_t k = 0; k < left.k_blocks || k == 0; k += longest) {
    const uint16_t *a = left.at(row_tile, k), *b = right.at(panel, k);
    int64_t depth = minimum(longest, left.k_blocks - k);
    float* target = k ? part : c;
    int64_t stride = k ? split_panel_width : c_stride;
    if (tiles == 2)
      split_tile_pair(a, left.k_blocks * left_block_elements, b, depth, target, stride);
    else
      split_tile(a, b, depth, target, stride);
    for (int64_t row = 0; k && row < tiles * split_rows; ++row)
      for (int64_t v = 0; v < split_panel_width; v += lanes<float>)
        store(c + row * c_stride + v, load(c + row * c_stride + v) + load(part + row * split_panel_width + v));
  }
  if (__builtin_expect(has_nan(c, c_stride, tiles * split_rows), 0))
    for (int64_t i = 0; i < tiles; ++i)
      repair_tile(left.at(row_tile + i, 0), right.at(panel, 0), left.k_blocks, c + i * split_rows * c_stride, c_stride);
}

// The large product: row tiles of the left factor against a run of panels of the right one.
//   finish(row_tile, rows, panel, sums) is called with complete sums [rows][32] in L1; `rows` is the number of rows of the
//   tiles, some of which may lie beyond the matrix.
// The rows stay in L2 (split_chunk_rows) while panel after panel goes by, the next one being asked for meanwhile.
template <class Finish>
FS_INLINE void multiply_split(SplitRows left, Range tiles, SplitPanels right, Range panels, Finish finish) {
  constexpr int64_t line = 64 / (int64_t)sizeof(uint16_t);
  alignas(64) float sums[2 * split_rows * split_panel_width];
  const int64_t pairs = (tiles.count() + 1) / 2, panel_lines = right.k_blocks * right_block_elements / line;
  const int64_t lines_at_once = pairs ? (panel_lines + pairs - 1) / pairs : 0;
  for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
    const uint16_t* ahead = right.at(panel + 1, 0);
    int64_t lines_left = panel + 1 < panels.end ? panel_lines : 0;
    for (int64_t tile = tiles.begin; tile < tiles.end; tile += 2) {
      int64_t count = minimum(2, tiles.end - tile), lines = minimum(lines_at_once, lines_left);
      for (int64_t i = 0; i < lines; ++i, ahead += line) __builtin_prefetch(ahead, 0, 2);
      lines_left -= lines;
      multiply_split_tiles(left, tile, count, right, panel, sums, split_panel_width);
      finish(tile, count * split_rows, panel, sums);
    }
  }
}

// Rows of a left factor that leave room for two panels in L2.
FS_INLINE int64_t split_chunk_rows(int64_t k_blocks) {
  int64_t rows = (1152 << 10) / maximum(1, k_blocks * split_depth * split_parts * 2) / 32 * 32;
  return maximum(64, minimum(rows, 512));
}

#else

struct TileMode {
  explicit TileMode(bool) {}
};

#endif  // FS_MATRIX_UNIT

}  // namespace
}  // namespace fastseq::FS_ISA
