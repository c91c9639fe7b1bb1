// Products of a few float32 rows with group-quantised and with bfloat16 matrices on a CPU, as XLA FFI targets.
//
// A matrix lies in tiles of 16 rows by one group of columns: 16 float16 scales, then for each 32 columns the quants of
// 16 rows, four columns at a time, so that one vector holds four columns of each of 16 rows. Activations are rounded to
// int8 with one scale per 32, as llama.cpp does; sums of 32 products are exact integers, the rest is float32.
// Three versions of the inner loop: AVX-512 VNNI, AVX2, and plain C++; the best one that the CPU has is taken.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "parallel.h"

namespace {

constexpr int kRows = 16;   // rows of a tile
constexpr int kBlock = 32;  // columns that share an activation's scale
constexpr int kTogether = 4;  // tile rows that one activation row meets at once

// Activations of one call: quants, scale of each 32, and what makes up for the weights' being stored without sign.
struct Activations {
  int64_t columns, blocks;
  std::vector<int8_t> quants;
  std::vector<float> scales;
  std::vector<int32_t> offsets;
};

struct Matrix {
  const uint8_t* tiles;
  int64_t rows, blocks, per_group;  // blocks of 32 columns in a row, and in a group
  int bits;
  int64_t block_bytes() const { return bits == 4 ? 256 : 512; }
  int64_t tile_bytes() const { return 32 + per_group * block_bytes(); }
};

void quantise(const float* x, Activations& a, int64_t row, int bias) {
  const int64_t width = a.blocks * kBlock;
  for (int64_t b = 0; b < a.blocks; ++b) {
    const float* from = x + row * width + b * kBlock;
    int8_t* to = a.quants.data() + row * width + b * kBlock;
    float top = 0;
    for (int i = 0; i < kBlock; ++i) top = std::fmax(top, std::fabs(from[i]));
    const float scale = top / 127, inverse = top > 0 ? 127 / top : 0;
    int32_t sum = 0;
    for (int i = 0; i < kBlock; ++i) {
      to[i] = static_cast<int8_t>(std::nearbyint(from[i] * inverse));
      sum += to[i];
    }
    a.scales[row * a.blocks + b] = scale;
    a.offsets[row * a.blocks + b] = -bias * sum;
  }
}

float half(uint16_t h) {
  const uint32_t sign = (h & 0x8000u) << 16, exponent = (h >> 10) & 31, fraction = h & 1023;
  if (exponent == 0) {
    const float small = std::ldexp(static_cast<float>(fraction), -24);
    return sign ? -small : small;
  }
  const uint32_t word = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | fraction << 13;
  float value;
  std::memcpy(&value, &word, 4);
  return value;
}

// Each version: the products of one tile row (16 rows of the matrix) with `count` activation rows from `first` on.
using Kernel = void (*)(const Matrix&, const uint8_t*, const Activations&, int64_t first, int count, float out[][kRows]);

template <int kBits>
void plain(const Matrix& m, const uint8_t* tile, const Activations& a, int64_t first, int count, float out[][kRows]) {
  std::memset(out, 0, sizeof(float) * kRows * count);
  for (int64_t b = 0; b < m.blocks; ++b) {
    const uint8_t* group = tile + b / m.per_group * m.tile_bytes();
    const uint8_t* w = group + 32 + b % m.per_group * m.block_bytes();
    for (int c = 0; c < count; ++c) {
      const int64_t at = (first + c) * a.blocks + b;
      const int8_t* x = a.quants.data() + at * kBlock;
      for (int r = 0; r < kRows; ++r) {
        int32_t sum = a.offsets[at];
        for (int v = 0; v < (kBits == 4 ? 4 : 8); ++v) {
          for (int i = 0; i < 4; ++i) {
            const uint8_t byte = w[v * 64 + r * 4 + i];
            if (kBits == 4) {
              sum += (byte & 15) * x[v * 4 + i] + (byte >> 4) * x[16 + v * 4 + i];
            } else {
              sum += (byte ^ 0x80) * x[v * 4 + i];
            }
          }
        }
        uint16_t scale;
        std::memcpy(&scale, group + r * 2, 2);
        out[c][r] += sum * (half(scale) * a.scales[at]);
      }
    }
  }
}

#ifdef X86
template <int kBits, int kCount>
__attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni,f16c,fma"))) inline void vnni_columns(
    const Matrix& m, const uint8_t* tile, const Activations& a, int64_t first, float out[][kRows]) {
  __m512 total[kCount];
  for (int c = 0; c < kCount; ++c) total[c] = _mm512_setzero_ps();
  const __m512i low = _mm512_set1_epi8(15), flip = _mm512_set1_epi8(-128);
  const int64_t bytes = m.block_bytes();
  int64_t b = 0;
  while (b < m.blocks) {
    const __m512 scales = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(tile)));
    const uint8_t* w = tile + 32;
    for (int64_t g = 0; g < m.per_group; ++g, ++b, w += bytes) {
      __m512i part[8];  // part[v]: columns 4v..4v+3 of 16 rows
      if (kBits == 4) {
        for (int v = 0; v < 4; ++v) {
          const __m512i both = _mm512_loadu_si512(w + 64 * v);
          part[v] = _mm512_and_si512(both, low);
          part[v + 4] = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
        }
      } else {
        for (int v = 0; v < 8; ++v) part[v] = _mm512_xor_si512(_mm512_loadu_si512(w + 64 * v), flip);
      }
      for (int c = 0; c < kCount; ++c) {
        const int64_t at = (first + c) * a.blocks + b;
        const int32_t* x = reinterpret_cast<const int32_t*>(a.quants.data() + at * kBlock);
        __m512i even = _mm512_set1_epi32(a.offsets[at]), odd = _mm512_setzero_si512();
        for (int v = 0; v < 8; v += 2) {
          even = _mm512_dpbusd_epi32(even, part[v], _mm512_set1_epi32(x[v]));
          odd = _mm512_dpbusd_epi32(odd, part[v + 1], _mm512_set1_epi32(x[v + 1]));
        }
        const __m512 sum = _mm512_cvtepi32_ps(_mm512_add_epi32(even, odd));
        total[c] = _mm512_fmadd_ps(sum, _mm512_mul_ps(scales, _mm512_set1_ps(a.scales[at])), total[c]);
      }
    }
    tile += 32 + m.per_group * bytes;
  }
  for (int c = 0; c < kCount; ++c) _mm512_storeu_ps(out[c], total[c]);
}

// One activation row and several tile rows, `apart` bytes from one another, so that more sums are under way at once.
template <int kBits, int kTiles>
__attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni,f16c,fma"))) inline void vnni_one(
    const Matrix& m, const uint8_t* tile, int64_t apart, const Activations& a, int64_t row, float* out) {
  __m512 total[kTiles];
  for (int t = 0; t < kTiles; ++t) total[t] = _mm512_setzero_ps();
  const __m512i low = _mm512_set1_epi8(15), flip = _mm512_set1_epi8(-128);
  const int64_t bytes = m.block_bytes(), size = m.tile_bytes();
  const int64_t first = row * a.blocks;
  for (int64_t b = 0; b < m.blocks; ++b) {
    const int64_t within = b % m.per_group;
    const uint8_t* group = tile + b / m.per_group * size;
    const int32_t* x = reinterpret_cast<const int32_t*>(a.quants.data() + (first + b) * kBlock);
    __m512i columns[8];
    for (int v = 0; v < 8; ++v) columns[v] = _mm512_set1_epi32(x[v]);
    const __m512i offset = _mm512_set1_epi32(a.offsets[first + b]);
    const __m512 scale = _mm512_set1_ps(a.scales[first + b]);
    for (int t = 0; t < kTiles; ++t, group += apart) {
      const uint8_t* w = group + 32 + within * bytes;

      __m512i even = offset, odd = _mm512_setzero_si512();
      if (kBits == 4) {
        for (int v = 0; v < 4; ++v) {
          const __m512i both = _mm512_loadu_si512(w + 64 * v);
          even = _mm512_dpbusd_epi32(even, _mm512_and_si512(both, low), columns[v]);
          odd = _mm512_dpbusd_epi32(odd, _mm512_and_si512(_mm512_srli_epi16(both, 4), low), columns[v + 4]);
        }
      } else {
        for (int v = 0; v < 8; v += 2) {
          even = _mm512_dpbusd_epi32(even, _mm512_xor_si512(_mm512_loadu_si512(w + 64 * v), flip), columns[v]);
          odd = _mm512_dpbusd_epi32(odd, _mm512_xor_si512(_mm512_loadu_si512(w + 64 * v + 64), flip), columns[v + 1]);
        }
      }
      const __m512 sum = _mm512_cvtepi32_ps(_mm512_add_epi32(even, odd));
      const __m512 scales = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(group)));
      total[t] = _mm512_fmadd_ps(sum, _mm512_mul_ps(scales, scale), total[t]);
    }
  }
  for (int t = 0; t < kTiles; ++t) _mm512_storeu_ps(out + t * kRows, total[t]);
}

template <int kBits>
void vnni(const Matrix& m, const uint8_t* tile, const Activations& a, int64_t first, int count, float out[][kRows]) {
  while (count >= 8) {
    vnni_columns<kBits, 8>(m, tile, a, first, out);
    first += 8, out += 8, count -= 8;
  }
  if (count >= 4) {
    vnni_columns<kBits, 4>(m, tile, a, first, out);
    first += 4, out += 4, count -= 4;
  }
  for (; count > 0; ++first, ++out, --count) vnni_columns<kBits, 1>(m, tile, a, first, out);
}

template <int kBits>
__attribute__((target("avx2,f16c,fma"))) void avx2(const Matrix& m, const uint8_t* tile, const Activations& a,
                                                   int64_t first, int count, float out[][kRows]) {
  const __m256i low = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
  for (int c = 0; c < count; ++c) {
    __m256 total[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
    for (int64_t b = 0; b < m.blocks; ++b) {
      const uint8_t* group = tile + b / m.per_group * m.tile_bytes();
      const uint8_t* w = group + 32 + b % m.per_group * m.block_bytes();
      const int64_t at = (first + c) * a.blocks + b;
      const int32_t* x = reinterpret_cast<const int32_t*>(a.quants.data() + at * kBlock);
      for (int h = 0; h < 2; ++h) {  // rows 0-7 and 8-15
        // Quants of 8 bits keep their sign here, so that nothing has to be made up for.
        __m256i sum = _mm256_set1_epi32(kBits == 4 ? a.offsets[at] : 0);
        for (int v = 0; v < (kBits == 4 ? 4 : 8); ++v) {
          const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + 64 * v + 32 * h));
          if (kBits == 4) {
            const __m256i high = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), low);
            const __m256i first_half = _mm256_maddubs_epi16(_mm256_and_si256(bytes, low), _mm256_set1_epi32(x[v]));
            const __m256i second_half = _mm256_maddubs_epi16(high, _mm256_set1_epi32(x[v + 4]));
            sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_add_epi16(first_half, second_half), ones));
          } else {
            const __m256i signs = _mm256_sign_epi8(_mm256_set1_epi32(x[v]), bytes);
            const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(bytes), signs);
            sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, ones));
          }
        }
        const __m256 scales = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(group + 16 * h)));
        const __m256 scale = _mm256_mul_ps(scales, _mm256_set1_ps(a.scales[at]));
        total[h] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), scale, total[h]);
      }
    }
    _mm256_storeu_ps(out[c], total[0]);
    _mm256_storeu_ps(out[c] + 8, total[1]);
  }
}
#endif

int best_version() {
#ifdef X86
  if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
    return 2;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
  return 0;
}

template <int kBits>
Kernel kernel_of(int version) {
#ifdef X86
  if (version == 2) return vnni<kBits>;
  if (version == 1) return avx2<kBits>;
#endif
  return plain<kBits>;
}

constexpr int kColumns = 64;  // activation rows that share a reading of the matrix

ffi::Error multiply(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::AnyBuffer tiles, ffi::ResultBuffer<ffi::F32> y,
                    int64_t bits, int64_t per_group, int64_t version) {
  const auto shape = x.dimensions(), result = y->dimensions();
  Activations a{shape[0], shape[1] / kBlock, {}, {}, {}};
  Matrix m{reinterpret_cast<const uint8_t*>(tiles.untyped_data()), result[1], a.blocks, per_group,
           static_cast<int>(bits)};
  const int64_t tile_rows = (m.rows + kRows - 1) / kRows, row_bytes = a.blocks / per_group * m.tile_bytes();
  if (shape[1] % (kBlock * per_group) || static_cast<int64_t>(tiles.size_bytes()) != tile_rows * row_bytes)
    return ffi::Error::InvalidArgument("the tiles do not fit the shapes");
  a.quants.resize(a.columns * shape[1]);
  a.scales.resize(a.columns * a.blocks);
  a.offsets.resize(a.columns * a.blocks);
  const float* from = x.typed_data();
  float* to = y->typed_data();
  auto round = [&](int64_t row) { quantise(from, a, row, bits == 4 ? 8 : 128); };
  if (a.columns >= 16) {
    parallel(pool, a.columns, round);
  } else {
    for (int64_t row = 0; row < a.columns; ++row) round(row);
  }
  const int best = best_version(), chosen = version < 0 || version > best ? best : static_cast<int>(version);
  const Kernel kernel = bits == 4 ? kernel_of<4>(chosen) : kernel_of<8>(chosen);
  const int64_t chunk = std::max<int64_t>(1, std::min<int64_t>(16, tile_rows / (4 * std::max<int64_t>(1, pool.num_threads()))));
  parallel(pool, (tile_rows + chunk - 1) / chunk, [&](int64_t part) {
    float out[kColumns][kRows];
#ifdef X86
    if (a.columns == 1 && chosen == 2) {
      const auto several = bits == 4 ? vnni_one<4, kTogether> : vnni_one<8, kTogether>;
      const auto single = bits == 4 ? vnni_one<4, 1> : vnni_one<8, 1>;
      const int64_t end = std::min(tile_rows, (part + 1) * chunk);
      for (int64_t t = part * chunk; t < end;) {
        const int count = end - t >= kTogether ? kTogether : 1;
        (count == 1 ? single : several)(m, m.tiles + t * row_bytes, row_bytes, a, 0, out[0]);
        std::memcpy(to + t * kRows, out[0], std::min<int64_t>(count * kRows, m.rows - t * kRows) * sizeof(float));
        t += count;
      }
      return;
    }
#endif
    for (int64_t column = 0; column < a.columns; column += kColumns) {
      const int count = static_cast<int>(std::min<int64_t>(kColumns, a.columns - column));
      for (int64_t t = part * chunk; t < std::min(tile_rows, (part + 1) * chunk); ++t) {
        kernel(m, m.tiles + t * row_bytes, a, column, count, out);
        const int64_t rows = std::min<int64_t>(kRows, m.rows - t * kRows);
        for (int c = 0; c < count; ++c) std::memcpy(to + (column + c) * m.rows + t * kRows, out[c], rows * sizeof(float));
      }
    }
  });
  return ffi::Error::Success();
}

// What is compiled for several kinds of CPU calls only what is inlined into it.
#ifdef X86
#define EACH_CPU __attribute__((target_clones("avx512f", "arch=haswell", "default")))
#else
#define EACH_CPU
#endif
#define INLINE __attribute__((always_inline)) inline

typedef float Sixteen __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));
typedef uint32_t Words __attribute__((vector_size(64)));

template <typename To>
INLINE To read(const void* from) {  // which need not be aligned
  To to;
  std::memcpy(&to, from, sizeof to);
  return to;
}

// Columns of a line: V is a float or sixteen.
template <typename V>
INLINE V columns(const float* w) { return read<V>(w); }

template <typename V>
INLINE V columns(const uint16_t* w) {  // of bfloat16
  if constexpr (sizeof(V) == sizeof(float)) {
    const uint32_t word = static_cast<uint32_t>(*w) << 16;
    return read<float>(&word);
  } else {
    const Words words = __builtin_convertvector(read<Halves>(w), Words) << 16;
    return read<V>(&words);
  }
}

template <int kRows, int kLines, typename V, typename Weight>
INLINE void add_block(const float* x, int64_t depth, const Weight* w, int64_t width, float* y) {
  V sum[kRows];
  for (int r = 0; r < kRows; ++r) sum[r] = columns<V>(y + r * width);
  for (int i = 0; i < kLines; ++i) {
    const V line = columns<V>(w + i * width);
    for (int r = 0; r < kRows; ++r) sum[r] += x[r * depth + i] * line;
  }
  for (int r = 0; r < kRows; ++r) std::memcpy(y + r * width, &sum[r], sizeof(V));
}

// Four rows at a time, so that their sums and a line are in registers.
template <int kLines, typename V, typename Weight>
INLINE void add_rows(const float* x, int64_t depth, const Weight* w, int64_t width, float* y, int64_t rows) {
  for (; rows >= 4; rows -= 4, x += 4 * depth, y += 4 * width) add_block<4, kLines, V>(x, depth, w, width, y);
  if (rows == 3) add_block<3, kLines, V>(x, depth, w, width, y);
  if (rows == 2) add_block<2, kLines, V>(x, depth, w, width, y);
  if (rows == 1) add_block<1, kLines, V>(x, depth, w, width, y);
}

template <int kLines, typename Weight>
INLINE void add_lines(const float* x, int64_t depth, const Weight* w, int64_t width, float* y, int64_t rows, int64_t count) {
  int64_t j = 0;
  for (; j + 16 <= count; j += 16) add_rows<kLines, Sixteen>(x, depth, w + j, width, y + j, rows);
  for (; j < count; ++j) add_rows<kLines, float>(x, depth, w + j, width, y + j, rows);
}

// Adds the products of a few rows x (rows, depth) with `count` columns of w (depth, width) to y (rows, width). Sixteen lines
// at a time: memory is read along lines, and a sum is fetched and put back once for each of these.
#define ADD_PRODUCTS(name, Weight)                                                                                        \
  EACH_CPU void name(const float* x, const Weight* w, float* y, int64_t rows, int64_t depth, int64_t width, int64_t count) { \
    int64_t k = 0;                                                                                                        \
    for (; k + 16 <= depth; k += 16) add_lines<16>(x + k, depth, w + k * width, width, y, rows, count);                     \
    for (; k < depth; ++k) add_lines<1>(x + k, depth, w + k * width, width, y, rows, count);                               \
  }
ADD_PRODUCTS(add_products, float)
ADD_PRODUCTS(add_products_of_half, uint16_t)

template <typename Weight, typename Add>
ffi::Error multiply_few(ffi::ThreadPool& pool, const ffi::Buffer<ffi::F32>& x, const Weight* w, int64_t width,
                        ffi::ResultBuffer<ffi::F32>& y, const Add& add) {
  const int64_t rows = x.dimensions()[0], depth = x.dimensions()[1];
  const int64_t tasks = 4 * std::max<int64_t>(1, pool.num_threads());
  const int64_t step = std::max<int64_t>(64, std::min<int64_t>(1024, (width + tasks - 1) / tasks));
  std::memset(y->typed_data(), 0, y->size_bytes());
  parallel(pool, (width + step - 1) / step, [&](int64_t i) {
    const int64_t first = i * step;
    add(x.typed_data(), w + first, y->typed_data() + first, rows, depth, width, std::min(step, width - first));
  });
  return ffi::Error::Success();
}

ffi::Error multiply_whole(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> w,
                          ffi::ResultBuffer<ffi::F32> y) {
  return multiply_few(pool, x, w.typed_data(), w.dimensions()[1], y, add_products);
}

ffi::Error multiply_half(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::BF16> w,
                         ffi::ResultBuffer<ffi::F32> y) {
  return multiply_few(pool, x, reinterpret_cast<const uint16_t*>(w.untyped_data()), w.dimensions()[1], y,
                      add_products_of_half);
}

}  // namespace

extern "C" int phi3_jax_grouped_version() { return best_version(); }

XLA_FFI_DEFINE_HANDLER_SYMBOL(phi3_jax_grouped, multiply,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("bits")
                                  .Attr<int64_t>("per_group")
                                  .Attr<int64_t>("version"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(phi3_jax_half, multiply_half,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::BF16>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(phi3_jax_whole, multiply_whole,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
