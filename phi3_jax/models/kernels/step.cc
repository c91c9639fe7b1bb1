// Attention of one new token a row on a CPU in float32, as an XLA FFI target. The token's key and value are put into their
// slots in place, and each row's keys and values are read once, those that it has and no more.
//
// 64 keys at a time meet all queries of their head (FlashAttention's running maximum and sum, arXiv:2205.14135).
// Compiled for the machine it runs on.

#include <cfloat>
#include <cmath>
#include <cstring>
#include <vector>

#include "parallel.h"
#include "vectors.h"

namespace {

constexpr int kKeys = 64;
constexpr float kInTwos = 1.44269504f;

struct Head {  // the queries (count, depth) of one key head, scaled for powers of two, and what they have found so far
  int64_t count, depth;
  const float* queries;
  float *top, *total, *sum;  // (count,), (count,), (count, depth)
};

// Sums over kVectors whole vectors; kVectors = 0: over any depth.
template <int kVectors>
inline float product(const float* a, const float* b, int64_t depth) {
  Vector sum = {};
  if (kVectors) {
    for (int v = 0; v < kVectors; ++v) sum += load(a + v * kLanes) * load(b + v * kLanes);
  } else {
    int64_t c = 0;
    for (; c + kLanes <= depth; c += kLanes) sum += load(a + c) * load(b + c);
    for (; c < depth; ++c) sum[0] += a[c] * b[c];
  }
  return total_of(sum);
}

template <int kVectors>
inline void add(float weight, const float* value, int64_t depth, float* sum) {
  int64_t c = 0;
  const Vector w = all(weight);
  if (kVectors) {
    for (int v = 0; v < kVectors; ++v) store(sum + v * kLanes, load(sum + v * kLanes) + w * load(value + v * kLanes));
    return;
  }
  for (; c + kLanes <= depth; c += kLanes) store(sum + c, load(sum + c) + w * load(value + c));
  for (; c < depth; ++c) sum[c] += weight * value[c];
}

// `count` keys and values (count, depth) that lie together.
template <int kVectors>
void meet(const Head& h, const float* keys, const float* values, int64_t count) {
  alignas(64) float scores[kKeys];
  for (int64_t first = 0; first < count; first += kKeys) {
    const int64_t here = std::min<int64_t>(kKeys, count - first), reach = (here + kLanes - 1) / kLanes * kLanes;
    const float *k = keys + first * h.depth, *v = values + first * h.depth;
    for (int64_t r = 0; r < h.count; ++r) {
      float highest = h.top[r];
      for (int64_t j = 0; j < here; ++j) {
        scores[j] = product<kVectors>(h.queries + r * h.depth, k + j * h.depth, h.depth);
        highest = highest > scores[j] ? highest : scores[j];
      }
      for (int64_t j = here; j < reach; ++j) scores[j] = -INFINITY;
      const Vector base = all(highest);
      Vector added = {};
      for (int64_t j = 0; j < reach; j += kLanes) {
        const Vector p = exp2_of(load(scores + j) - base);
        added += p;
        store(scores + j, p);
      }
      float* sum = h.sum + r * h.depth;
      const float shrunk = exp2_of(all(h.top[r] - highest))[0];
      if (highest != h.top[r])
        for (int64_t c = 0; c < h.depth; ++c) sum[c] *= shrunk;
      h.total[r] = h.total[r] * shrunk + total_of(added);
      h.top[r] = highest;
      for (int64_t j = 0; j < here; ++j) add<kVectors>(scores[j], v + j * h.depth, h.depth, sum);
    }
  }
}

void meet(const Head& h, const float* keys, const float* values, int64_t count) {
  switch (h.depth % kLanes ? 0 : h.depth / kLanes) {
    case 1: return meet<1>(h, keys, values, count);
    case 2: return meet<2>(h, keys, values, count);
    case 3: return meet<3>(h, keys, values, count);
    case 4: return meet<4>(h, keys, values, count);
    case 6: return meet<6>(h, keys, values, count);
    case 8: return meet<8>(h, keys, values, count);
    default: return meet<0>(h, keys, values, count);
  }
}

// q, y (batch, heads, queries per head, depth); k, v (batch, heads, depth) of the token; keys, values (batch, heads, slots
// + spare, depth), which are those of the results; before_keys, before_values (heads, tokens, depth) of what all rows begin
// with, and how many of these there are; position (batch,) of the token, counted from there. A row sees its last `window`
// positions, or all with 0.
ffi::Error attend(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> q, ffi::Buffer<ffi::F32> k, ffi::Buffer<ffi::F32> v,
                  ffi::Buffer<ffi::F32> keys, ffi::Buffer<ffi::F32> values, ffi::Buffer<ffi::F32> before_keys,
                  ffi::Buffer<ffi::F32> before_values, ffi::Buffer<ffi::S32> before, ffi::Buffer<ffi::S32> position,
                  ffi::ResultBuffer<ffi::F32> y, ffi::ResultBuffer<ffi::F32> all_keys,
                  ffi::ResultBuffer<ffi::F32> all_values, double scale, int64_t window, int64_t spare) {
  const auto shape = q.dimensions(), cached = keys.dimensions();
  if (shape.size() != 4 || cached.size() != 4 || keys.typed_data() != all_keys->typed_data() ||
      values.typed_data() != all_values->typed_data())
    return ffi::Error::InvalidArgument("a cache that is written in place");
  const int64_t batch = shape[0], heads = shape[1], per = shape[2], depth = shape[3];
  const int64_t slots = cached[2] - spare, tokens = before_keys.dimensions()[1];
  const int64_t read = std::min<int64_t>(std::max(0, before.typed_data()[0]), tokens);
  if (slots < 1) return ffi::Error::InvalidArgument("a cache without slots");
  for (int64_t b = 0; b < batch; ++b)
    if (position.typed_data()[b] < 0) return ffi::Error::InvalidArgument("a token's position below 0");
  parallel(pool, heads * batch, [&](int64_t task) {  // rows of a head one after the other, as they share what comes before
    const int64_t b = task % batch, head = task / batch, at = position.typed_data()[b];
    const int64_t line = b * heads + head;
    float* own_keys = all_keys->typed_data() + line * cached[2] * depth;
    float* own_values = all_values->typed_data() + line * cached[2] * depth;
    std::memcpy(own_keys + at % slots * depth, k.typed_data() + line * depth, depth * sizeof(float));
    std::memcpy(own_values + at % slots * depth, v.typed_data() + line * depth, depth * sizeof(float));
    std::vector<float> room(per * (depth + 2));
    float *scaled = room.data(), *top = scaled + per * depth, *total = top + per;
    float* out = y->typed_data() + line * per * depth;
    for (int64_t i = 0; i < per * depth; ++i)
      scaled[i] = q.typed_data()[line * per * depth + i] * static_cast<float>(scale) * kInTwos;
    std::fill(top, top + per, -FLT_MAX);
    std::fill(total, total + per, 0.f);
    std::fill(out, out + per * depth, 0.f);
    const Head h{per, depth, scaled, top, total, out};
    const int64_t first = window ? std::max<int64_t>(0, read + at - window + 1) : 0;
    if (first < read) {
      const int64_t from = (head * tokens + first) * depth;
      meet(h, before_keys.typed_data() + from, before_values.typed_data() + from, read - first);
    }
    const int64_t begin = std::max<int64_t>({0, first - read, at - slots + 1}), seen = at + 1 - begin;
    const int64_t slot = begin % slots, together = std::min(seen, slots - slot);
    meet(h, own_keys + slot * depth, own_values + slot * depth, together);
    meet(h, own_keys, own_values, seen - together);
    for (int64_t r = 0; r < per; ++r)
      for (int64_t c = 0; c < depth; ++c) out[r * depth + c] /= total[r];
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(phi3_jax_step, attend,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<double>("scale")
                                  .Attr<int64_t>("window")
                                  .Attr<int64_t>("spare"));
