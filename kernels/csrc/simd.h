// Portable SIMD for the CPU operators: GCC/Clang vector extensions, one binary for every x86-64.
//
// An operator writes its hot loop once, as `template <int W> GR_INLINE void name_body(args...)`, where W is the
// number of float lanes, and GR_MULTIVERSION(name, (typed params), (args)) compiles it for AVX-512 (W = 16),
// AVX2 + FMA (W = 8) and the baseline (W = 4: SSE2, NEON, ...) and picks one when the operator runs. Everything a
// body calls must be GR_INLINE: only what is inlined is compiled for the wider instruction set. (No lambdas in a
// body: hand the cloned function to at::parallel_for instead.) Simple loops that the compiler vectorises by itself
// can use GR_CLONES on a free function.
#pragma once

#include <cstdint>
#include <cstring>

#define GR_INLINE static inline __attribute__((always_inline))
#define GR_RESTRICT __restrict__

#if defined(__x86_64__) && defined(__GNUC__)
#define GR_X86 1
#define GR_TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx2,fma,bmi,bmi2")))
#define GR_TARGET_AVX2 __attribute__((target("avx2,fma,bmi,bmi2")))
#else
#define GR_X86 0
#endif

// target_clones needs GCC's ifunc support, which Linux has.
#if GR_X86 && defined(__linux__) && !defined(__clang__) && __GNUC__ >= 12
#define GR_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define GR_CLONES
#endif

namespace gr {

// Float lanes of the widest instruction set this processor has: 16, 8 or 4.
inline int simd_lanes() {
#if GR_X86
  static const int lanes = [] {
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma")) {
      return 16;
    }
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? 8 : 4;
  }();
  return lanes;
#else
  return 4;
#endif
}

}  // namespace gr

// Defines `void name(params)`, which runs name_body<W> for this processor.
#if GR_X86
#define GR_MULTIVERSION(name, params, args)                      \
  GR_TARGET_AVX512 void name##_avx512 params { name##_body<16> args; } \
  GR_TARGET_AVX2 void name##_avx2 params { name##_body<8> args; }      \
  void name##_base params { name##_body<4> args; }               \
  void name params {                                             \
    switch (gr::simd_lanes()) {                                  \
      case 16: return name##_avx512 args;                        \
      case 8: return name##_avx2 args;                           \
      default: return name##_base args;                          \
    }                                                            \
  }
#else
#define GR_MULTIVERSION(name, params, args) \
  void name params { name##_body<4> args; }
#endif

namespace gr {

// Vectors of W lanes. Comparisons give Int lanes of 0 or -1; `mask ? a : b` selects lane by lane.
template <int W>
struct Lanes {
  typedef float Float __attribute__((vector_size(W * 4)));
  typedef int32_t Int __attribute__((vector_size(W * 4)));
};
template <int W>
using Float = typename Lanes<W>::Float;
template <int W>
using Int = typename Lanes<W>::Int;

template <int W>
GR_INLINE Float<W> load(const float* p) {
  Float<W> v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

template <int W>
GR_INLINE void store(float* p, Float<W> v) {
  std::memcpy(p, &v, sizeof(v));
}

template <int W>
GR_INLINE Float<W> broadcast(float x) {
  return x - Float<W>{};  // x in every lane (x - 0 keeps -0, NaN and Inf)
}

template <int W>
GR_INLINE Float<W> bits_to_float(Int<W> v) {
  return (Float<W>)v;
}

// 0, 1, ..., W - 1.
template <int W>
GR_INLINE Int<W> iota() {
  Int<W> v;
  for (int i = 0; i < W; ++i) v[i] = i;
  return v;
}

template <int W>
GR_INLINE Float<W> max(Float<W> a, Float<W> b) {
  return a > b ? a : b;
}

// The sum of the lanes, always in the same order (halving).
template <int W>
GR_INLINE float sum(Float<W> v) {
  float lanes[W];
  store<W>(lanes, v);
  for (int half = W / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

template <int W>
GR_INLINE float largest(Float<W> v) {
  float lanes[W];
  store<W>(lanes, v);
  float best = lanes[0];
  for (int i = 1; i < W; ++i) best = lanes[i] > best ? lanes[i] : best;
  return best;
}

// exp(x) to about 1 ulp: x = n ln 2 + r with |r| <= ln 2 / 2, a degree-6 polynomial (minimax on that interval),
// then 2^n applied in two factors so that results near the overflow and underflow limits stay right.
// Overflows to +Inf above 88.7228, underflows to 0 below -103.97; NaN in, NaN out.
template <int W>
GR_INLINE Float<W> exp(Float<W> x) {
  // Clamped so that n fits; both selects keep x where the comparison is false, and so keep NaN.
  Float<W> clamped = x > 89.0f ? broadcast<W>(89.0f) : x;
  clamped = clamped < -105.0f ? broadcast<W>(-105.0f) : clamped;
  const float round = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
  const Float<W> shifted = clamped * 1.44269504088896341f + round;
  const Float<W> n = shifted - round;
  Float<W> r = clamped - n * 0.693359375f;  // ln 2 split in two: the first product is exact
  r = r - n * -2.12194440e-4f;
  Float<W> p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const Int<W> exponent = (Int<W>)shifted - 0x4B400000;
  const Int<W> half = exponent >> 1;
  const Float<W> first = bits_to_float<W>((half + 127) << 23);
  const Float<W> second = bits_to_float<W>((exponent - half + 127) << 23);
  // A NaN makes a meaningless exponent but finite or infinite factors at worst times NaN: NaN.
  return (p * first) * second;
}

// 1 / (1 + exp(-x)).
template <int W>
GR_INLINE Float<W> sigmoid(Float<W> x) {
  return 1.0f / (1.0f + exp<W>(-x));
}

// Dot product of `count` floats, any alignment; the order of the sum depends on count and W alone.
template <int W>
GR_INLINE float dot(const float* a, const float* b, int64_t count) {
  Float<W> even{}, odd{};
  int64_t i = 0;
  for (; i + 2 * W <= count; i += 2 * W) {
    even += load<W>(a + i) * load<W>(b + i);
    odd += load<W>(a + i + W) * load<W>(b + i + W);
  }
  for (; i + W <= count; i += W) even += load<W>(a + i) * load<W>(b + i);
  float total = sum<W>(even + odd);
  for (; i < count; ++i) total += a[i] * b[i];
  return total;
}

// y += alpha * x over `count` floats.
template <int W>
GR_INLINE void axpy(float alpha, const float* GR_RESTRICT x, float* GR_RESTRICT y, int64_t count) {
  int64_t i = 0;
  for (; i + W <= count; i += W) store<W>(y + i, load<W>(y + i) + alpha * load<W>(x + i));
  for (; i < count; ++i) y[i] += alpha * x[i];
}

GR_INLINE int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// C[R x (NV*W)] = (or +=) sum over t < depth of a(r, t) * B[t][0 .. NV*W), a(r, t) = a[r * a_row + t * a_step].
// One register tile: R * NV accumulators, which start from zero and are added to C at the end, so a long sum cut into
// pieces (pairs of sums) loses less to rounding than one running sum. Rows of B and C are `b_stride` and `c_stride` floats apart.
template <int W, int R, int NV, bool ACCUMULATE>
GR_INLINE void tile_gemm(const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_stride,
                         int64_t depth, float* c, int64_t c_stride) {
  Float<W> acc[R][NV];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) acc[r][v] = Float<W>{};
  }
  for (int64_t t = 0; t < depth; ++t) {
    Float<W> row[NV];
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) row[v] = load<W>(b + t * b_stride + v * W);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const float x = a[r * a_row + t * a_step];
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) acc[r][v] += x * row[v];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) {
      float* to = c + r * c_stride + v * W;
      store<W>(to, ACCUMULATE ? load<W>(to) + acc[r][v] : acc[r][v]);
    }
  }
}

// C[rows x columns] = (or +=) A B with `columns` a multiple of W (pad it): tiles of R x 2 vectors, then what is left.
// a(r, t) = a[r * a_row + t * a_step], so the same code multiplies by A or by A transposed.
template <int W, int R, bool ACCUMULATE>
GR_INLINE void gemm(const float* a, int64_t a_row, int64_t a_step, int64_t rows, const float* b, int64_t b_stride,
                    int64_t depth, int64_t columns, float* c, int64_t c_stride) {
  int64_t column = 0;
  for (; column + 2 * W <= columns; column += 2 * W) {
    int64_t row = 0;
    for (; row + R <= rows; row += R) {
      tile_gemm<W, R, 2, ACCUMULATE>(a + row * a_row, a_row, a_step, b + column, b_stride, depth,
                                     c + row * c_stride + column, c_stride);
    }
    for (; row < rows; ++row) {
      tile_gemm<W, 1, 2, ACCUMULATE>(a + row * a_row, a_row, a_step, b + column, b_stride, depth,
                                     c + row * c_stride + column, c_stride);
    }
  }
  for (; column < columns; column += W) {
    int64_t row = 0;
    for (; row + R <= rows; row += R) {
      tile_gemm<W, R, 1, ACCUMULATE>(a + row * a_row, a_row, a_step, b + column, b_stride, depth,
                                     c + row * c_stride + column, c_stride);
    }
    for (; row < rows; ++row) {
      tile_gemm<W, 1, 1, ACCUMULATE>(a + row * a_row, a_row, a_step, b + column, b_stride, depth,
                                     c + row * c_stride + column, c_stride);
    }
  }
}

}  // namespace gr
