// Vectors of the machine that this is compiled for, by the compiler's own.

#include <cstdint>

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
typedef float Vector __attribute__((vector_size(kLanes * sizeof(float)), aligned(4), may_alias));
typedef int32_t Whole __attribute__((vector_size(kLanes * sizeof(int32_t)), aligned(4), may_alias));

inline Vector load(const float* from) { return *reinterpret_cast<const Vector*>(from); }
inline void store(float* to, Vector x) { *reinterpret_cast<Vector*>(to) = x; }
inline Vector all(float x) { return x - Vector{}; }  // minus nothing, which compilers leave out; plus 0 would change -0


inline float total_of(Vector x) {
  float lanes[kLanes];
  store(lanes, x);
  for (int n = kLanes / 2; n; n /= 2)
    for (int i = 0; i < n; ++i) lanes[i] += lanes[i + n];
  return lanes[0];
}

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
