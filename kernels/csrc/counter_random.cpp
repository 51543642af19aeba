// Counter-based random numbers, several Philox blocks at a time: kernels/gr_kernels/counter_random.
//
// Block b of item t is Philox4x32-10 at counter (c0[t], b, ordinal[t] low, ordinal[t] high) and gives draws 4b to
// 4b + 3. Lanes run over the flat index t * blocks + b, so that short and long rows of draws cost the same.
#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>

#include "philox.h"
#include "simd.h"

namespace {

struct Counters {
  uint32_t key0, key1;
  const int64_t* ordinals;   // T
  const int64_t* positions;  // T, or null for 0
  int64_t draws;             // a row of the output
};

// What a word becomes.
struct ToInt64 {
  using Value = int64_t;
  GR_INLINE Value apply(uint32_t word, uint64_t high) { return int64_t((uint64_t{word} * high) >> 32); }
};
struct ToInt32 {
  using Value = int32_t;
  GR_INLINE Value apply(uint32_t word, uint64_t high) { return int32_t((uint64_t{word} * high) >> 32); }
};
struct ToFloat {  // [0, 1), 24 bits
  using Value = float;
  GR_INLINE Value apply(uint32_t word, uint64_t) { return float(int32_t(word >> 8)) * 0x1p-24f; }
};
struct ToSymmetricDouble {  // (-1, 1), exact
  using Value = double;
  GR_INLINE Value apply(uint32_t word, uint64_t) {
    return double(2 * int64_t{word} + 1) * 0x1p-32 - 1.0;
  }
};

// Blocks [begin, end) of the flat index. L lanes: a multiple of the vector width, to overlap the multiplies.
template <int L, class To>
GR_INLINE void draw_blocks(const Counters& counters, uint64_t high, int64_t begin, int64_t end,
                           typename To::Value* GR_RESTRICT out) {
  using Value = typename To::Value;
  const int64_t draws = counters.draws, blocks = (draws + 3) / 4;
  int64_t item = begin / blocks, block = begin % blocks;
  for (int64_t flat = begin; flat < end; flat += L) {
    const int lanes = int(std::min<int64_t>(L, end - flat));
    uint32_t c0[L] = {}, c1[L] = {}, c2[L] = {}, c3[L] = {};
    const int64_t first_item = item, first_block = block;
    for (int lane = 0; lane < lanes; ++lane) {
      const uint64_t ordinal = uint64_t(counters.ordinals[item]);
      c0[lane] = counters.positions ? uint32_t(counters.positions[item]) : 0;
      c1[lane] = uint32_t(block);
      c2[lane] = uint32_t(ordinal);
      c3[lane] = uint32_t(ordinal >> 32);
      if (++block == blocks) {
        block = 0;
        ++item;
      }
    }
    uint32_t w0[L], w1[L], w2[L], w3[L];
    for (int lane = 0; lane < L; ++lane) {
      gr::philox4x32_10(counters.key0, counters.key1, c0[lane], c1[lane], c2[lane], c3[lane], w0[lane], w1[lane],
                        w2[lane], w3[lane]);
    }
    Value values[4 * L];
    for (int lane = 0; lane < L; ++lane) {
      values[4 * lane + 0] = To::apply(w0[lane], high);
      values[4 * lane + 1] = To::apply(w1[lane], high);
      values[4 * lane + 2] = To::apply(w2[lane], high);
      values[4 * lane + 3] = To::apply(w3[lane], high);
    }
    if (draws % 4 == 0) {  // rows follow one another without a gap
      std::memcpy(out + 4 * flat, values, 4 * sizeof(Value) * size_t(lanes));
      continue;
    }
    int64_t t = first_item, b = first_block;
    for (int lane = 0; lane < lanes; ++lane) {
      const int64_t count = std::min<int64_t>(4, draws - 4 * b);
      for (int64_t i = 0; i < count; ++i) out[t * draws + 4 * b + i] = values[4 * lane + i];
      if (++b == blocks) {
        b = 0;
        ++t;
      }
    }
  }
}

template <int W>
GR_INLINE void draw_int64_body(const Counters& c, uint64_t high, int64_t begin, int64_t end, int64_t* out) {
  draw_blocks<2 * W, ToInt64>(c, high, begin, end, out);
}
template <int W>
GR_INLINE void draw_int32_body(const Counters& c, uint64_t high, int64_t begin, int64_t end, int32_t* out) {
  draw_blocks<2 * W, ToInt32>(c, high, begin, end, out);
}
template <int W>
GR_INLINE void draw_float_body(const Counters& c, uint64_t high, int64_t begin, int64_t end, float* out) {
  draw_blocks<2 * W, ToFloat>(c, high, begin, end, out);
}
template <int W>
GR_INLINE void draw_double_body(const Counters& c, uint64_t high, int64_t begin, int64_t end, double* out) {
  draw_blocks<2 * W, ToSymmetricDouble>(c, high, begin, end, out);
}

GR_MULTIVERSION(draw_int64, (const Counters& c, uint64_t high, int64_t begin, int64_t end, int64_t* out),
                (c, high, begin, end, out))
GR_MULTIVERSION(draw_int32, (const Counters& c, uint64_t high, int64_t begin, int64_t end, int32_t* out),
                (c, high, begin, end, out))
GR_MULTIVERSION(draw_float, (const Counters& c, uint64_t high, int64_t begin, int64_t end, float* out),
                (c, high, begin, end, out))
GR_MULTIVERSION(draw_double, (const Counters& c, uint64_t high, int64_t begin, int64_t end, double* out),
                (c, high, begin, end, out))

template <class Value>
void fill(void (*draw)(const Counters&, uint64_t, int64_t, int64_t, Value*), int64_t key, const at::Tensor& ordinals,
          const at::Tensor* positions, int64_t draws, uint64_t high, at::Tensor& out) {
  const at::Tensor ordinals_T = ordinals.contiguous();
  const at::Tensor positions_T = positions ? positions->contiguous() : at::Tensor();
  const Counters counters{uint32_t(uint64_t(key)), uint32_t(uint64_t(key) >> 32),
                          ordinals_T.const_data_ptr<int64_t>(),
                          positions ? positions_T.const_data_ptr<int64_t>() : nullptr, draws};
  Value* data = out.mutable_data_ptr<Value>();
  const int64_t blocks = (draws + 3) / 4;
  at::parallel_for(0, ordinals_T.size(0) * blocks, 4096, [&](int64_t begin, int64_t end) {
    draw(counters, high, begin, end, data);
  });
}

at::Tensor output(const at::Tensor& ordinals, const c10::SymInt& draws, at::ScalarType dtype) {
  return at::empty_symint({ordinals.sym_size(0), draws}, ordinals.options().dtype(dtype));
}

at::Tensor counter_integers(int64_t key, const at::Tensor& ordinals, const at::Tensor& positions, int64_t draws,
                            int64_t high, bool narrow) {
  at::Tensor out = output(ordinals, draws, narrow ? at::kInt : at::kLong);
  if (narrow) {
    fill<int32_t>(draw_int32, key, ordinals, &positions, draws, uint64_t(high), out);
  } else {
    fill<int64_t>(draw_int64, key, ordinals, &positions, draws, uint64_t(high), out);
  }
  return out;
}

at::Tensor counter_integers_meta(int64_t, const at::Tensor& ordinals, const at::Tensor&, int64_t draws, int64_t,
                                 bool narrow) {
  return output(ordinals, draws, narrow ? at::kInt : at::kLong);
}

at::Tensor counter_floats(int64_t key, const at::Tensor& ordinals, const at::Tensor& positions, int64_t draws) {
  at::Tensor out = output(ordinals, draws, at::kFloat);
  fill<float>(draw_float, key, ordinals, &positions, draws, 0, out);
  return out;
}

at::Tensor counter_floats_meta(int64_t, const at::Tensor& ordinals, const at::Tensor&, int64_t draws) {
  return output(ordinals, draws, at::kFloat);
}

at::Tensor counter_row_uniforms(int64_t key, const at::Tensor& rows, int64_t width) {
  at::Tensor out = output(rows, width, at::kDouble);
  fill<double>(draw_double, key, rows, nullptr, width, 0, out);
  return out;
}

at::Tensor counter_row_uniforms_meta(int64_t, const at::Tensor& rows, int64_t width) {
  return output(rows, width, at::kDouble);
}

TORCH_LIBRARY_FRAGMENT(gr_kernels, m) {
  m.def("counter_integers(int key, Tensor ordinals, Tensor positions, int draws, int high, bool narrow) -> Tensor");
  m.def("counter_floats(int key, Tensor ordinals, Tensor positions, int draws) -> Tensor");
  m.def("counter_row_uniforms(int key, Tensor rows, int width) -> Tensor");
}

TORCH_LIBRARY_IMPL(gr_kernels, CPU, m) {
  m.impl("counter_integers", counter_integers);
  m.impl("counter_floats", counter_floats);
  m.impl("counter_row_uniforms", counter_row_uniforms);
}

TORCH_LIBRARY_IMPL(gr_kernels, Meta, m) {
  m.impl("counter_integers", counter_integers_meta);
  m.impl("counter_floats", counter_floats_meta);
  m.impl("counter_row_uniforms", counter_row_uniforms_meta);
}

}  // namespace
