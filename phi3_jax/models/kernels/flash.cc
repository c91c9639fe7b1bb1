// Causal attention on a CPU in float32 and its gradients, as XLA FFI targets: scores live in a small block and are never
// written out.
//
// A block of 96 queries meets 128 keys at a time (FlashAttention's running maximum and sum, arXiv:2205.14135). Keys are
// transposed once per call, so that one vector holds the scores of neighbouring keys; values are padded to whole vectors.
// What the mask leaves out whole (later keys, keys before the window, blocks of other documents) is skipped. Gradients make
// the probabilities of a block again, from the logarithm of each query's sum (arXiv:2307.08691, algorithm 2).
// Compiled for the machine it runs on.

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>

#include "parallel.h"
#include "vectors.h"

namespace {

constexpr int kQueries = 96, kKeys = 128;
constexpr int kPanel = 2 * kLanes;             // keys that lie together, transposed
constexpr int kTall = kLanes == 16 ? 12 : 6;  // queries whose sums fit into the registers, two vectors each
constexpr int kFlat = kLanes == 16 ? 8 : 4;   // keys whose sums fit into the registers, two vectors each
constexpr float kLowest = -FLT_MAX;
// A token's number is that of its document times kBranches, and of its branch. It sees its own branch and branch 0.
constexpr int32_t kBranches = 4096;
constexpr int32_t trunk(int32_t number) { return number & ~(kBranches - 1); }

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

// out (rows, width) += p (rows, of `stride`) times values (count, width), for kRows rows and kVectors vectors.
template <int kRows, int kVectors>
inline void weighted(const float* p, int64_t stride, const float* values, int64_t count, int64_t width, float* out) {
  Vector sum[kRows][kVectors];
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) sum[r][v] = load(out + r * width + v * kLanes);
  for (int64_t j = 0; j < count; ++j) {
    Vector x[kVectors];
    for (int v = 0; v < kVectors; ++v) x[v] = load(values + j * width + v * kLanes);
    for (int r = 0; r < kRows; ++r) {
      const Vector weight = all(p[r * stride + j]);
      for (int v = 0; v < kVectors; ++v) sum[r][v] += weight * x[v];
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) store(out + r * width + v * kLanes, sum[r][v]);
}

// out (rows, width) += p (rows, of `stride`) times values (count, width); rows to the next multiple of kRows.
template <int kRows>
void weigh(const float* p, int64_t stride, int64_t rows, const float* values, int64_t count, int64_t width, float* out) {
  int64_t c = 0;
  for (; c + 2 * kLanes <= width; c += 2 * kLanes)
    for (int64_t r = 0; r < rows; r += kRows)
      weighted<kRows, 2>(p + r * stride, stride, values + c, count, width, out + r * width + c);
  if (c < width)
    for (int64_t r = 0; r < rows; r += kRows)
      weighted<kRows, 1>(p + r * stride, stride, values + c, count, width, out + r * width + c);
}

struct Problem {
  int64_t time, heads, queries_per_head, depth, width, window;  // width: depth in whole vectors
  const int32_t* segments;                                      // of this row, or null
};

// The lowest and highest number of a span of tokens.
std::pair<int32_t, int32_t> documents(const int32_t* segments, int64_t first, int64_t last) {
  const auto ends = std::minmax_element(segments + first, segments + last);
  return {*ends.first, *ends.second};
}

enum class Meets { kNone, kSome, kAll };

// x in whole panels.
constexpr int64_t in_panels(int64_t x) { return (x + kPanel - 1) / kPanel * kPanel; }

// Whether queries from `first` on see a block of keys that begins no later than the last of them.
Meets met(const Problem& a, int64_t first, int64_t rows, int64_t key, int64_t count) {
  const bool whole = key + kKeys - 1 <= first && (!a.window || first + rows - 1 - key < a.window);
  if (a.segments == nullptr) return whole ? Meets::kAll : Meets::kSome;
  const auto mine = documents(a.segments, first, first + rows), theirs = documents(a.segments, key, key + count);
  if (theirs.second < trunk(mine.first) || theirs.first > mine.second) return Meets::kNone;
  const bool begun = theirs.first == trunk(mine.first) && theirs.first == trunk(mine.second);
  return whole && theirs.first == theirs.second && (begun || theirs == mine) ? Meets::kAll : Meets::kSome;
}

// The first block of keys that queries from `first` on may see.
int64_t begin(const Problem& a, int64_t first) {
  return a.window ? std::max<int64_t>(0, first - a.window + 1) / kKeys * kKeys : 0;
}

void mask(const Problem& a, int64_t first, int64_t rows, int64_t key, int64_t count, float* scores) {
  const int64_t reach = in_panels(count);
  for (int64_t r = 0; r < rows; ++r) {
    float* row = scores + r * kKeys;
    const int64_t i = first + r;
    const int64_t low = a.window ? std::clamp<int64_t>(i - a.window + 1 - key, 0, count) : 0;
    const int64_t high = std::clamp<int64_t>(i + 1 - key, 0, count);
    for (int64_t j = 0; j < low; ++j) row[j] = kLowest;
    for (int64_t j = high; j < reach; ++j) row[j] = kLowest;
    if (a.segments == nullptr) continue;
    const int32_t own = a.segments[i], begun = trunk(own);
    for (int64_t j = low; j < high; ++j) {
      const int32_t other = a.segments[key + j];
      row[j] = other == own || other == begun ? row[j] : kLowest;
    }
  }
}

// One block of queries of one head.
void block(const Problem& a, const float* q, int64_t q_stride, const float* keys, const float* values, float scale,
           int64_t first, float* out, float* logs, int64_t logs_stride) {
  const int64_t rows = std::min<int64_t>(kQueries, a.time - first);
  float scores[kQueries * kKeys], top[kQueries], total[kQueries];
  std::unique_ptr<float[]> scaled(new float[kQueries * a.depth]()), sum(new float[kQueries * a.width]());
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < a.depth; ++c) scaled[r * a.depth + c] = q[(first + r) * q_stride + c] * scale;
  if (rows < kQueries) std::fill(scores, scores + kQueries * kKeys, 0.f);
  std::fill(top, top + kQueries, kLowest);
  std::fill(total, total + kQueries, 0.f);
  for (int64_t key = begin(a, first); key < first + rows; key += kKeys) {
    const int64_t count = std::min<int64_t>(kKeys, first + rows - key), reach = in_panels(count);
    const Meets meets = met(a, first, rows, key, count);
    if (meets == Meets::kNone) continue;
    const float* k = keys + key * a.depth;
    for (int64_t j = 0; j < reach; j += kPanel)
      for (int64_t r = 0; r < rows; r += kTall)
        products(scaled.get() + r * a.depth, k + j * a.depth, a.depth, scores + r * kKeys + j);
    if (meets == Meets::kSome) mask(a, first, rows, key, count, scores);
    for (int64_t r = 0; r < rows; ++r) {
      float* row = scores + r * kKeys;
      Vector most = load(row);
      for (int64_t j = kLanes; j < reach; j += kLanes) most = most > load(row + j) ? most : load(row + j);
      float highest = top[r];
      for (int i = 0; i < kLanes; ++i) highest = highest > most[i] ? highest : most[i];
      const Vector base = all(highest);
      Vector added = all(0.f);
      for (int64_t j = 0; j < reach; j += kLanes) {
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
    weigh<kTall>(scores, kKeys, rows, v, count, a.width, sum.get());
  }
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < a.depth; ++c) out[(first + r) * q_stride + c] = sum[r * a.width + c] / total[r];
  for (int64_t r = 0; r < rows; ++r) logs[(first + r) * logs_stride] = top[r] + std::log2(total[r]);
}

// Keys or values (time, depth), `stride` apart, transposed in panels of kPanel; depth and time padded with nothing.
void panels(const float* from, int64_t stride, const Problem& a, int64_t depth, int64_t padded, float* to) {
  for (int64_t j = 0; j < padded; ++j) {
    float* panel = to + j / kPanel * kPanel * depth + j % kPanel;
    for (int64_t c = 0; c < depth; ++c) panel[c * kPanel] = j < a.time && c < a.depth ? from[j * stride + c] : 0;
  }
}

// Rows (count, depth), `stride` apart, times `scale`, into rows of whole vectors (rows, width); nothing behind the last.
void lines(const float* from, int64_t stride, const Problem& a, int64_t count, int64_t rows, float scale, float* to) {
  std::fill(to, to + rows * a.width, 0.f);
  for (int64_t j = 0; j < count; ++j)
    for (int64_t c = 0; c < a.depth; ++c) to[j * a.width + c] = from[j * stride + c] * scale;
}

struct Head {  // of one row: pointers to its first element; gradients are strided as what they are of
  const float *q, *k, *v, *y, *d_y, *logs;
  float *d_q, *d_k, *d_v;
  int64_t q_stride, kv_stride, logs_stride;
};

// Gradients of all queries of one key head; in_twos: scale of the scores as powers of two.
void gradients(const Problem& a, const Head& h, float scale, float in_twos) {
  const int64_t padded = in_panels(a.time), width = a.width;
  const auto some = [](int64_t count) { return std::unique_ptr<float[]>(new float[count]()); };
  const auto key_panels = some(padded * width), value_panels = some(padded * width), key_lines = some(padded * width);
  const auto d_keys = some(padded * width), d_values = some(padded * width);
  const auto queries = some(kQueries * width), d_out = some(kQueries * width), d_queries = some(kQueries * width);
  const auto p = some(kQueries * kKeys), d_p = some(kQueries * kKeys);
  const auto p_over = some(kKeys * kQueries), d_s_over = some(kKeys * kQueries);
  panels(h.k, h.kv_stride, a, width, padded, key_panels.get());
  panels(h.v, h.kv_stride, a, width, padded, value_panels.get());
  lines(h.k, h.kv_stride, a, a.time, padded, 1, key_lines.get());
  for (int64_t of = 0; of < a.queries_per_head; ++of) {
    const int64_t offset = of * a.depth;
    for (int64_t first = 0; first < a.time; first += kQueries) {
      const int64_t rows = std::min<int64_t>(kQueries, a.time - first), begun = first * h.q_stride + offset;
      lines(h.q + begun, h.q_stride, a, rows, kQueries, in_twos, queries.get());
      lines(h.d_y + begun, h.q_stride, a, rows, kQueries, 1, d_out.get());
      std::fill(d_queries.get(), d_queries.get() + kQueries * width, 0.f);
      float log_sum[kQueries] = {}, along[kQueries] = {};  // along: of the output, the gradient that changes no weight
      for (int64_t r = 0; r < rows; ++r) {
        log_sum[r] = h.logs[(first + r) * h.logs_stride + of];
        for (int64_t c = 0; c < a.depth; ++c) along[r] += d_out[r * width + c] * h.y[begun + r * h.q_stride + c];
      }
      for (int64_t key = begin(a, first); key < first + rows; key += kKeys) {
        const int64_t count = std::min<int64_t>(kKeys, first + rows - key), reach = in_panels(count);
        const Meets meets = met(a, first, rows, key, count);
        if (meets == Meets::kNone) continue;
        for (int64_t j = 0; j < reach; j += kPanel)
          for (int64_t r = 0; r < rows; r += kTall) {
            products(queries.get() + r * width, key_panels.get() + (key + j) * width, width, p.get() + r * kKeys + j);
            products(d_out.get() + r * width, value_panels.get() + (key + j) * width, width, d_p.get() + r * kKeys + j);
          }
        if (meets == Meets::kSome) mask(a, first, rows, key, count, p.get());
        for (int64_t r = 0; r < rows; ++r) {
          const Vector base = all(log_sum[r]), less = all(along[r]);
          float *weight = p.get() + r * kKeys, *d_score = d_p.get() + r * kKeys;
          for (int64_t j = 0; j < reach; j += kLanes) {
            const Vector x = exp2_of(load(weight + j) - base);
            store(weight + j, x);
            store(d_score + j, x * (load(d_score + j) - less));
          }
        }
        for (int64_t r = 0; r < rows; ++r)
          for (int64_t j = 0; j < reach; ++j) {
            p_over[j * kQueries + r] = p[r * kKeys + j];
            d_s_over[j * kQueries + r] = d_p[r * kKeys + j];
          }
        weigh<kTall>(d_p.get(), kKeys, rows, key_lines.get() + key * width, count, width, d_queries.get());
        weigh<kFlat>(p_over.get(), kQueries, reach, d_out.get(), rows, width, d_values.get() + key * width);
        weigh<kFlat>(d_s_over.get(), kQueries, reach, queries.get(), rows, width, d_keys.get() + key * width);
      }
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < a.depth; ++c) h.d_q[begun + r * h.q_stride + c] = scale * d_queries[r * width + c];
    }
  }
  const float back = scale / in_twos;  // queries were scaled for powers of two
  for (int64_t j = 0; j < a.time; ++j)
    for (int64_t c = 0; c < a.depth; ++c) {
      h.d_k[j * h.kv_stride + c] = back * d_keys[j * width + c];
      h.d_v[j * h.kv_stride + c] = d_values[j * width + c];
    }
}

constexpr double kInTwos = 1.4426950408889634;

// q, y (batch, time, heads, queries per head, depth), k, v (batch, time, heads, depth); segments (batch, time) or (0,); logs
// (batch, time, heads, queries per head), of each query's sum of exponentials, to base 2.
ffi::Error attend(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> q, ffi::Buffer<ffi::F32> k, ffi::Buffer<ffi::F32> v,
                  ffi::Buffer<ffi::S32> segments, ffi::ResultBuffer<ffi::F32> y, ffi::ResultBuffer<ffi::F32> logs,
                  double scale, int64_t window) {
  const auto shape = q.dimensions();
  if (shape.size() != 5 || k.element_count() != v.element_count() ||
      k.element_count() * shape[3] != q.element_count())
    return ffi::Error::InvalidArgument("shapes of q, k and v do not fit");
  const int64_t batch = shape[0], time = shape[1], heads = shape[2], per = shape[3], depth = shape[4];
  const int64_t width = (depth + kLanes - 1) / kLanes * kLanes, padded = in_panels(time);
  std::unique_ptr<float[]> keys(new float[batch * heads * padded * depth]);
  std::unique_ptr<float[]> values(new float[batch * heads * padded * width]);
  const int64_t blocks = (padded + kKeys - 1) / kKeys;
  parallel(pool, batch * heads * blocks, [&](int64_t task) {
    const int64_t key = task % blocks * kKeys, head = task / blocks % heads, b = task / blocks / heads;
    float* to = keys.get() + (b * heads + head) * padded * depth + key * depth;
    float* into = values.get() + (b * heads + head) * padded * width + key * width;
    for (int64_t j = 0; j < std::min<int64_t>(kKeys, padded - key); ++j) {
      const int64_t from = ((b * time + key + j) * heads + head) * depth;
      const bool there = key + j < time;
      float* panel = to + j / kPanel * kPanel * depth + j % kPanel;
      for (int64_t c = 0; c < depth; ++c) panel[c * kPanel] = there ? k.typed_data()[from + c] : 0;
      for (int64_t c = 0; c < width; ++c) into[j * width + c] = there && c < depth ? v.typed_data()[from + c] : 0;
    }
  });
  const int64_t parts = (time + kQueries - 1) / kQueries, stride = heads * per * depth;
  const float in_twos = static_cast<float>(scale * kInTwos);
  const int32_t* documents = segments.element_count() ? segments.typed_data() : nullptr;
  parallel(pool, batch * heads * per * parts, [&](int64_t task) {
    // the longest first
    const int64_t part = parts - 1 - task / (batch * heads * per), rest = task % (batch * heads * per);
    const int64_t r = rest % per, head = rest / per % heads, b = rest / per / heads;
    const Problem a{time, heads, per, depth, width, window, documents ? documents + b * time : nullptr};
    const int64_t offset = b * time * stride + (head * per + r) * depth;
    block(a, q.typed_data() + offset, stride, keys.get() + (b * heads + head) * padded * depth,
          values.get() + (b * heads + head) * padded * width, in_twos, part * kQueries, y->typed_data() + offset,
          logs->typed_data() + b * time * heads * per + head * per + r, heads * per);
  });
  return ffi::Error::Success();
}

// Of `attend`: y and logs are what it gave, d_y the gradient of y. One task a row and key head.
ffi::Error back(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> q, ffi::Buffer<ffi::F32> k, ffi::Buffer<ffi::F32> v,
                ffi::Buffer<ffi::S32> segments, ffi::Buffer<ffi::F32> y, ffi::Buffer<ffi::F32> logs,
                ffi::Buffer<ffi::F32> d_y, ffi::ResultBuffer<ffi::F32> d_q, ffi::ResultBuffer<ffi::F32> d_k,
                ffi::ResultBuffer<ffi::F32> d_v, double scale, int64_t window) {
  const auto shape = q.dimensions();
  const int64_t batch = shape[0], time = shape[1], heads = shape[2], per = shape[3], depth = shape[4];
  const int64_t width = (depth + kLanes - 1) / kLanes * kLanes;
  const int32_t* documents = segments.element_count() ? segments.typed_data() : nullptr;
  parallel(pool, batch * heads, [&](int64_t task) {
    const int64_t head = task % heads, b = task / heads;
    const Problem a{time, heads, per, depth, width, window, documents ? documents + b * time : nullptr};
    const int64_t ours = (b * time * heads + head) * depth, theirs = ours * per;
    gradients(a,
              Head{q.typed_data() + theirs, k.typed_data() + ours, v.typed_data() + ours, y.typed_data() + theirs,
                   d_y.typed_data() + theirs, logs.typed_data() + (b * time * heads + head) * per,
                   d_q->typed_data() + theirs, d_k->typed_data() + ours, d_v->typed_data() + ours,
                   heads * per * depth, heads * depth, heads * per},
              static_cast<float>(scale), static_cast<float>(scale * kInTwos));
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
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<double>("scale")
                                  .Attr<int64_t>("window"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(phi3_jax_flash_back, back,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<double>("scale")
                                  .Attr<int64_t>("window"));
