// Causal attention on a CPU in float32, as an XLA FFI target: scores live in a small block and are never written out.
//
// A block of 96 queries meets 128 keys at a time (FlashAttention's running maximum and sum, arXiv:2205.14135). Keys are
// transposed once per call, so that one vector holds the scores of neighbouring keys; values are padded to whole vectors.
// What the mask leaves out whole (later keys, keys before the window, blocks of other documents) is skipped.
// Compiled for the machine it runs on; vectors are the compiler's own.

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>

#include "parallel.h"

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
typedef float Vector __attribute__((vector_size(kLanes * sizeof(float)), aligned(4), may_alias));
typedef int32_t Whole __attribute__((vector_size(kLanes * sizeof(int32_t)), aligned(4), may_alias));

constexpr int kQueries = 96, kKeys = 128;
constexpr int kPanel = 2 * kLanes;             // keys that lie together, transposed
constexpr int kTall = kLanes == 16 ? 12 : 6;  // queries whose sums fit into the registers, two vectors each
constexpr float kLowest = -FLT_MAX;

inline Vector load(const float* from) { return *reinterpret_cast<const Vector*>(from); }
inline void store(float* to, Vector x) { *reinterpret_cast<Vector*>(to) = x; }
inline Vector all(float x) { return x - Vector{}; }  // minus nothing, which compilers leave out; plus 0 would change -0

// 2^x for x <= 0, exactly 0 below -126; NaN stays NaN. Relative error below 2e-7.
inline Vector exp2_of(Vector x) {
  const Vector magic = all(12582912.f);  // 1.5 * 2^23: adding it rounds to a whole number
  const Vector clamped = x < all(-126.f) ? all(-126.f) : x;
  const Vector shifted = clamped + magic, whole = shifted - magic, f = clamped - whole;
  Vector p = all(1.3291764e-3f);  // minimax on [-1/2, 1/2]
  p = p * f + all(9.6756247e-3f);
  p = p * f + all(5.5506539e-2f);
  p = p * f + all(2.4022120e-1f);
  p = p * f + all(6.9314702e-1f);
  p = p * f + all(1.0000000f);
  const Whole bits = (reinterpret_cast<const Whole&>(shifted) + 127) << 23;
  return x < all(-126.f) ? all(0.f) : p * reinterpret_cast<const Vector&>(bits);
}

// scores (rows, kKeys) of kTall queries and one panel of keys.
inline void products(const float* q, const float* panel, int64_t depth, float* scores) {
  Vector sum[kTall][2] = {};
  for (int64_t c = 0; c < depth; ++c) {
    const Vector left = load(panel + c * kPanel), right = load(panel + c * kPanel + kLanes);
    for (int r = 0; r < kTall; ++r) {
      const Vector x = all(q[r * depth + c]);
      sum[r][0] += x * left;
      sum[r][1] += x * right;
    }
  }
  for (int r = 0; r < kTall; ++r) {
    store(scores + r * kKeys, sum[r][0]);
    store(scores + r * kKeys + kLanes, sum[r][1]);
  }
}

// out (rows, width) += p (rows, kKeys) times values (count, width), for kRows rows and kVectors vectors.
template <int kRows, int kVectors>
inline void weighted(const float* p, const float* values, int64_t count, int64_t width, float* out) {
  Vector sum[kRows][kVectors];
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) sum[r][v] = load(out + r * width + v * kLanes);
  for (int64_t j = 0; j < count; ++j) {
    Vector x[kVectors];
    for (int v = 0; v < kVectors; ++v) x[v] = load(values + j * width + v * kLanes);
    for (int r = 0; r < kRows; ++r) {
      const Vector weight = all(p[r * kKeys + j]);
      for (int v = 0; v < kVectors; ++v) sum[r][v] += weight * x[v];
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) store(out + r * width + v * kLanes, sum[r][v]);
}

struct Problem {
  int64_t time, heads, queries_per_head, depth, width, window;  // width: depth in whole vectors
  const int32_t* segments;                                      // of this row, or null
};

// Which documents a span of tokens is of: the lowest and highest number.
std::pair<int32_t, int32_t> documents(const int32_t* segments, int64_t first, int64_t last) {
  const auto ends = std::minmax_element(segments + first, segments + last);
  return {*ends.first, *ends.second};
}

void mask(const Problem& a, int64_t first, int64_t rows, int64_t key, int64_t count, float* scores) {
  for (int64_t r = 0; r < rows; ++r) {
    float* row = scores + r * kKeys;
    const int64_t i = first + r;
    const int64_t low = a.window ? std::clamp<int64_t>(i - a.window + 1 - key, 0, kKeys) : 0;
    const int64_t high = std::clamp<int64_t>(i + 1 - key, 0, count);
    for (int64_t j = 0; j < low; ++j) row[j] = kLowest;
    for (int64_t j = high; j < kKeys; ++j) row[j] = kLowest;
    if (a.segments == nullptr) continue;
    const int32_t own = a.segments[i];
    for (int64_t j = low; j < high; ++j) row[j] = a.segments[key + j] == own ? row[j] : kLowest;
  }
}

// One block of queries of one head.
void block(const Problem& a, const float* q, int64_t q_stride, const float* keys, const float* values, float scale,
           int64_t first, float* out) {
  const int64_t rows = std::min<int64_t>(kQueries, a.time - first);
  float scores[kQueries * kKeys], top[kQueries], total[kQueries];
  std::unique_ptr<float[]> scaled(new float[kQueries * a.depth]()), sum(new float[kQueries * a.width]());
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < a.depth; ++c) scaled[r * a.depth + c] = q[(first + r) * q_stride + c] * scale;
  if (rows < kQueries) std::fill(scores, scores + kQueries * kKeys, 0.f);
  std::fill(top, top + kQueries, kLowest);
  std::fill(total, total + kQueries, 0.f);
  const auto mine = a.segments ? documents(a.segments, first, first + rows) : std::pair<int32_t, int32_t>{};
  const int64_t begin = a.window ? std::max<int64_t>(0, first - a.window + 1) / kKeys * kKeys : 0;
  for (int64_t key = begin; key < first + rows; key += kKeys) {
    const int64_t count = std::min<int64_t>(kKeys, a.time - key);
    bool whole = key + kKeys - 1 <= first && (!a.window || first + rows - 1 - key < a.window);
    if (a.segments) {
      const auto theirs = documents(a.segments, key, key + count);
      if (theirs.second < mine.first || theirs.first > mine.second) continue;
      whole = whole && theirs.first == theirs.second && theirs == mine;
    }
    const float* k = keys + key * a.depth;
    for (int64_t j = 0; j < kKeys; j += kPanel)
      for (int64_t r = 0; r < rows; r += kTall)
        products(scaled.get() + r * a.depth, k + j * a.depth, a.depth, scores + r * kKeys + j);
    if (!whole) mask(a, first, rows, key, count, scores);
    for (int64_t r = 0; r < rows; ++r) {
      float* row = scores + r * kKeys;
      Vector most = load(row);
      for (int j = kLanes; j < kKeys; j += kLanes) most = most > load(row + j) ? most : load(row + j);
      float highest = top[r];
      for (int i = 0; i < kLanes; ++i) highest = highest > most[i] ? highest : most[i];
      const Vector base = all(highest);
      Vector added = all(0.f);
      for (int j = 0; j < kKeys; j += kLanes) {
        const Vector p = exp2_of(load(row + j) - base);
        added += p;
        store(row + j, p);
      }
      float more = 0;
      for (int i = 0; i < kLanes; ++i) more += added[i];
      if (highest != top[r]) {
        const float shrunk = exp2_of(all(top[r] - highest))[0];
        total[r] *= shrunk;
        float* to = sum.get() + r * a.width;
        for (int64_t c = 0; c < a.width; c += kLanes) store(to + c, load(to + c) * all(shrunk));
        top[r] = highest;
      }
      total[r] += more;
    }
    const float* v = values + key * a.width;
    int64_t c = 0;
    for (; c + 2 * kLanes <= a.width; c += 2 * kLanes)
      for (int64_t r = 0; r < rows; r += kTall)
        weighted<kTall, 2>(scores + r * kKeys, v + c, count, a.width, sum.get() + r * a.width + c);
    if (c < a.width)
      for (int64_t r = 0; r < rows; r += 12)
        weighted<12, 1>(scores + r * kKeys, v + c, count, a.width, sum.get() + r * a.width + c);
  }
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < a.depth; ++c) out[(first + r) * q_stride + c] = sum[r * a.width + c] / total[r];
}

// q, y (batch, time, heads, queries per head, depth), k, v (batch, time, heads, depth); segments (batch, time) or (0,).
ffi::Error attend(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> q, ffi::Buffer<ffi::F32> k, ffi::Buffer<ffi::F32> v,
                  ffi::Buffer<ffi::S32> segments, ffi::ResultBuffer<ffi::F32> y, double scale, int64_t window) {
  const auto shape = q.dimensions();
  if (shape.size() != 5 || k.element_count() != v.element_count() ||
      k.element_count() * shape[3] != q.element_count())
    return ffi::Error::InvalidArgument("shapes of q, k and v do not fit");
  const int64_t batch = shape[0], time = shape[1], heads = shape[2], per = shape[3], depth = shape[4];
  const int64_t width = (depth + kLanes - 1) / kLanes * kLanes, padded = (time + kKeys - 1) / kKeys * kKeys;
  std::unique_ptr<float[]> keys(new float[batch * heads * padded * depth]);
  std::unique_ptr<float[]> values(new float[batch * heads * padded * width]);
  const int64_t blocks = padded / kKeys;
  parallel(pool, batch * heads * blocks, [&](int64_t task) {
    const int64_t key = task % blocks * kKeys, head = task / blocks % heads, b = task / blocks / heads;
    float* to = keys.get() + (b * heads + head) * padded * depth + key * depth;
    float* into = values.get() + (b * heads + head) * padded * width + key * width;
    for (int64_t j = 0; j < kKeys; ++j) {
      const int64_t from = ((b * time + key + j) * heads + head) * depth;
      const bool there = key + j < time;
      float* panel = to + j / kPanel * kPanel * depth + j % kPanel;
      for (int64_t c = 0; c < depth; ++c) panel[c * kPanel] = there ? k.typed_data()[from + c] : 0;
      for (int64_t c = 0; c < width; ++c) into[j * width + c] = there && c < depth ? v.typed_data()[from + c] : 0;
    }
  });
  const int64_t parts = (time + kQueries - 1) / kQueries, stride = heads * per * depth;
  const float in_twos = static_cast<float>(scale * 1.4426950408889634);
  const int32_t* documents = segments.element_count() ? segments.typed_data() : nullptr;
  parallel(pool, batch * heads * per * parts, [&](int64_t task) {
    // the longest first
    const int64_t part = parts - 1 - task / (batch * heads * per), rest = task % (batch * heads * per);
    const int64_t r = rest % per, head = rest / per % heads, b = rest / per / heads;
    const Problem a{time, heads, per, depth, width, window, documents ? documents + b * time : nullptr};
    const int64_t offset = b * time * stride + (head * per + r) * depth;
    block(a, q.typed_data() + offset, stride, keys.get() + (b * heads + head) * padded * depth,
          values.get() + (b * heads + head) * padded * width, in_twos, part * kQueries, y->typed_data() + offset);
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(phi3_jax_flash, attend,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<double>("scale")
                                  .Attr<int64_t>("window"));
