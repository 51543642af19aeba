// Jagged HSTU attention on CPU, float32, forward and backward: see gr_kernels/hstu_attention/README.md for the maths.
//
// One task is one head of one sequence, computed by one thread from start to end, so results don't depend on the
// number of threads or on the other sequences. A task packs its rows into zero-padded scratch (K and V also
// transposed where they are the right-hand side of a product over their width), then goes over blocks of ROWS query
// rows: scores against all the keys the block sees, element-wise work row by row, and the products with A and dS.
// Scratch is one thread's, and grows with the longest sequence, not with the batch.
//
// What a target sees is the history, which all targets of a block share, and itself: its own score stands behind those
// of the history while weights are made, and is then multiplied by itself, so that no score is computed in vain.
//
// n key rows of the sequence, the last m of which are queries, Q query/key width, V value width, W float lanes, R rows
// of a register tile.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <numeric>
#include <tuple>
#include <vector>

#include "philox.h"
#include "simd.h"
#include "time_buckets.h"

namespace gr {
namespace {

constexpr int64_t ROWS = 32;  // query rows of a block
constexpr int64_t DEPTH = 256;  // keys summed in registers before their sum is added to the output
constexpr int64_t HISTOGRAMS = 4;  // copies of the time gradient, so that equal neighbours don't wait for each other

template <int W>
constexpr int TILE_ROWS = W == 16 ? 8 : 4;

struct Matrix {  // the rows of a (rows, H, width) tensor
  const float* data = nullptr;
  int64_t row = 0, head = 0;
};

struct Problem {
  Matrix q, k, v, d_out;
  int64_t Q = 0, V = 0, H = 0;
  const int64_t* offsets = nullptr;
  const int64_t* query_offsets = nullptr;  // offsets, where queries and keys are the same rows
  const int64_t* targets = nullptr;        // or none
  const float* position = nullptr;
  const float* time = nullptr;
  int64_t bucket_count = 0;
  const int64_t* query_times = nullptr;
  const int64_t* key_times = nullptr;
  TimeBucketTable buckets;
  float scale = 1, inverse_divisor = 1;
  bool softmax = false, causal = true;
  bool dropout = false;
  uint64_t drop_below = 0;
  float keep_scale = 1;
  uint32_t key0 = 0, key1 = 0;
  // Forward: out, of q's rows, (T, H, V). Backward: d_q, d_k, d_v as q, k, v. All contiguous.
  float *out = nullptr, *d_q = nullptr, *d_k = nullptr, *d_v = nullptr;
};

struct Task {
  int64_t begin, length;         // rows of k: n of them
  int64_t query_begin, queries;  // rows of q: m of them, the last of the n
  int64_t history;               // how many of the n are no targets
  int64_t head;
  float* d_position;  // where this task's part of the bias gradients goes: length floats, then bucket_count
  float* d_time;
};

// Hands out cache-line aligned pieces of a thread's scratch. A null base only counts.
struct Arena {
  float* base;
  int64_t used;
};

GR_INLINE float* take(Arena& arena, int64_t count) {
  float* piece = arena.base + arena.used;
  arena.used += round_up(count, 16);
  return piece;
}

// Some rows of a sequence, computed together: the sequence's `rows` rows from `first` on. They see its first `keys`
// keys, with `causal` none of them behind the row itself, with `own` each row's own key too, which isn't one of those.
struct Block {
  int64_t first, rows, keys;
  bool causal, own;
};

// The block that begins with row i. Rows of history and targets share none.
GR_INLINE Block block_at(const Problem& p, const Task& task, int64_t i) {
  const int64_t rows = std::min(ROWS, task.length - i);
  if (!p.causal) return {i, rows, task.length, false, false};
  if (i >= task.history) return {i, rows, task.history, false, true};
  const int64_t end = std::min(i + ROWS, task.history);
  return {i, end - i, end, true, false};
}

// A task's scratch. `stride` is the length of a row of scores, at least n + R with room to write whole vectors. Blocks
// begin anywhere in a sequence, so tiles of R rows may read that many rows past the last query.
struct Scratch {
  int64_t stride, Qp, Vp, padded, padded_queries;
  float *q, *kt, *k, *v, *vt, *d_out, *s, *da, *tile, *d_k, *d_v, *position, *d_position, *histogram, *keep;
  int32_t *bucket, *query_times, *key_times;
};

GR_INLINE Scratch carve(Arena& arena, int64_t n, int64_t m, int64_t Q, int64_t V, int64_t bucket_count, int W, int R,
                        bool backward) {
  Scratch x{};
  x.stride = round_up(n + 2 * W, 2 * W);
  x.padded = round_up(n, R);
  x.padded_queries = m + R;
  x.Qp = round_up(Q, W);
  x.Vp = round_up(V, W);
  const int64_t block = std::max<int64_t>(ROWS, R);
  x.q = take(arena, x.padded_queries * x.Qp);
  x.kt = take(arena, Q * x.stride);
  x.s = take(arena, block * x.stride);
  x.tile = take(arena, block * std::max(x.Qp, x.Vp));
  x.keep = take(arena, x.stride);
  x.position = take(arena, n + x.stride);
  x.bucket = reinterpret_cast<int32_t*>(take(arena, x.stride));
  x.query_times = reinterpret_cast<int32_t*>(take(arena, m));
  x.key_times = reinterpret_cast<int32_t*>(take(arena, x.stride));
  if (!backward) {
    x.v = take(arena, x.padded * x.Vp);
    return x;
  }
  x.k = take(arena, x.padded * x.Qp);
  x.vt = take(arena, V * x.stride);
  x.d_out = take(arena, x.padded_queries * x.Vp);
  x.da = take(arena, block * x.stride);
  x.d_k = take(arena, x.padded * x.Qp);
  x.d_v = take(arena, x.padded * x.Vp);
  x.d_position = take(arena, n + x.stride);
  x.histogram = take(arena, HISTOGRAMS * bucket_count);
  return x;
}

GR_INLINE const float* keys_of(const Matrix& x, const Task& task) {
  return x.data + task.begin * x.row + task.head * x.head;
}

GR_INLINE const float* queries_of(const Matrix& x, const Task& task) {
  return x.data + task.query_begin * x.row + task.head * x.head;
}

// n rows of `width` floats, times `factor`, into zero-padded rows of `padded_width`; `padded` rows in all.
GR_INLINE void pack(const float* x, int64_t row, int64_t n, int64_t width, float factor, int64_t padded,
                    int64_t padded_width, float* GR_RESTRICT to) {
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t d = 0; d < width; ++d) to[i * padded_width + d] = factor * x[i * row + d];
    for (int64_t d = width; d < padded_width; ++d) to[i * padded_width + d] = 0;
  }
  std::memset(to + n * padded_width, 0, (padded - n) * padded_width * sizeof(float));
}

// n rows of `width` floats, transposed: `width` rows of `stride`, zero past n.
GR_INLINE void pack_transposed(const float* x, int64_t row, int64_t n, int64_t width, int64_t stride,
                               float* GR_RESTRICT to) {
  constexpr int64_t TILE = 16;  // rows at a time, to write whole cache lines
  for (int64_t i0 = 0; i0 < n; i0 += TILE) {
    const int64_t i1 = std::min(n, i0 + TILE);
    for (int64_t d = 0; d < width; ++d) {
      for (int64_t i = i0; i < i1; ++i) to[d * stride + i] = x[i * row + d];
    }
  }
  for (int64_t d = 0; d < width; ++d) std::memset(to + d * stride + n, 0, (stride - n) * sizeof(float));
}

GR_INLINE void unpack(const float* from, int64_t padded_width, int64_t n, int64_t width, float factor, float* to,
                      int64_t row) {
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t d = 0; d < width; ++d) to[i * row + d] = factor * from[i * padded_width + d];
  }
}

// C[r][c] of a block's rows against the keys it sees: a (padded rows) times b (transposed keys). Tiles wholly above a
// causal block's diagonal are left as they are.
template <int W, int R>
GR_INLINE void block_scores(const Block& block, const float* a, int64_t depth, int64_t a_row, const float* b,
                            int64_t stride, float* c) {
  for (int64_t column = 0; column < block.keys; column += 2 * W) {
    const int64_t skip = block.causal && column > block.first ? (column - block.first) / R * R : 0;
    for (int64_t r = skip; r < block.rows; r += R) {
      tile_gemm<W, R, 2, false>(a + r * a_row, a_row, 1, b + column, stride, depth, c + r * stride + column, stride);
    }
  }
}

// tile[r][..] = sum over the block's keys that a row may see of weights[r][j] b[j][..]; weights are zero past each
// row's last key.
template <int W, int R>
GR_INLINE void block_product(const Block& block, const float* weights, int64_t stride, const float* b, int64_t width,
                             float* tile) {
  for (int64_t r = 0; r < block.rows; r += R) {
    const float* a = weights + r * stride;
    float* c = tile + r * width;
    const int64_t depth = block.causal ? std::min(block.keys, block.first + r + R) : block.keys;
    gemm<W, R, false>(a, stride, 1, R, b, width, std::min(depth, DEPTH), width, c, width);
    for (int64_t j = DEPTH; j < depth; j += DEPTH) {
      gemm<W, R, true>(a + j, stride, 1, R, b + j * width, width, std::min(depth - j, DEPTH), width, c, width);
    }
  }
}

// sums[j][..] += sum over the block's rows i that see j of weights[i][j] b[i][..].
template <int W, int R>
GR_INLINE void block_product_transposed(const Block& block, const float* weights, int64_t stride, const float* b,
                                        int64_t width, float* sums) {
  for (int64_t j = 0; j < block.keys; j += R) {
    const int64_t skip = block.causal && j > block.first ? j - block.first : 0;
    gemm<W, R, true>(weights + skip * stride + j, 1, stride, R, b + skip * width, width, block.rows - skip, width,
                     sums + j * width, width);
  }
}

// to[r][..] += weights[r] b[r][..]: what each row gets from itself.
template <int W>
GR_INLINE void add_own(const Block& block, const float* weights, const float* b, int64_t width, float* to) {
  for (int64_t r = 0; r < block.rows; ++r) axpy<W>(weights[r], b + r * width, to + r * width, width);
}

// 1 / (1 - dropout) or 0 for each of `count` weights of a row, from key 4 first_quad on: word j % 4 of
// Philox(row, head, j / 4, 0).
GR_INLINE void keep_factors(const Problem& p, uint32_t row, uint32_t head, int64_t first_quad, int64_t count,
                            float* GR_RESTRICT keep) {
  const int64_t quads = (count + 3) / 4;
  const uint64_t drop_below = p.drop_below;
  const float kept = p.keep_scale;
  const uint32_t key0 = p.key0, key1 = p.key1;
#pragma omp simd
  for (int64_t c = 0; c < quads; ++c) {
    uint32_t w0, w1, w2, w3;
    philox4x32_10(key0, key1, row, head, static_cast<uint32_t>(first_quad + c), 0, w0, w1, w2, w3);
    keep[4 * c] = w0 >= drop_below ? kept : 0.0f;
    keep[4 * c + 1] = w1 >= drop_below ? kept : 0.0f;
    keep[4 * c + 2] = w2 >= drop_below ? kept : 0.0f;
    keep[4 * c + 3] = w3 >= drop_below ? kept : 0.0f;
  }
}

// How far the times of a sequence are apart, and so how they are subtracted.
enum class Span { kInt32, kInt64, kBeyond };

// The bias of one sequence, ready to be added row by row.
struct Bias {
  Span span;
};

GR_INLINE Bias prepare_bias(const Problem& p, const Task& task, Scratch& x) {
  const int64_t n = task.length, m = task.queries;
  if (p.position) {
    // Reversed, so that the entries i - j of a row are ascending in j: position[n - 1 - i + j].
    for (int64_t e = 0; e < n; ++e) x.position[e] = p.position[n - 1 - e];
    std::memset(x.position + n, 0, x.stride * sizeof(float));
  }
  Bias bias{Span::kInt32};
  if (p.time) {
    const int64_t* query_times = p.query_times + task.query_begin;
    const int64_t* key_times = p.key_times + task.begin;
    int64_t low = key_times[0], high = key_times[0];
    for (int64_t j = 0; j < n; ++j) low = std::min(low, key_times[j]), high = std::max(high, key_times[j]);
    for (int64_t i = 0; i < m; ++i) low = std::min(low, query_times[i]), high = std::max(high, query_times[i]);
    const uint64_t apart = static_cast<uint64_t>(high) - static_cast<uint64_t>(low);
    if (apart >= (uint64_t{1} << 31) - 1) {
      bias.span = apart <= static_cast<uint64_t>(kLongest) ? Span::kInt64 : Span::kBeyond;
    } else {
      for (int64_t i = 0; i < m; ++i) x.query_times[i] = static_cast<int32_t>(query_times[i] - low);
      for (int64_t j = 0; j < n; ++j) x.key_times[j] = static_cast<int32_t>(key_times[j] - low);
    }
  }
  return bias;
}

// s[c] += bias of row i and key first_key + c for c < count; leaves the buckets in `bucket`. May write up to a vector
// of s past count.
template <int W>
GR_INLINE void add_bias(const Problem& p, const Task& task, const Bias& bias, const Scratch& x, int64_t i,
                        int64_t first_key, int64_t count, float* GR_RESTRICT s, int32_t* GR_RESTRICT bucket) {
  if (p.position) {
    const float* entries = x.position + (task.length - 1 - i) + first_key;
    for (int64_t j = 0; j < count; j += W) store<W>(s + j, load<W>(s + j) + load<W>(entries + j));
  }
  if (p.time) {
    const TimeBucketTable& t = p.buckets;
    const int64_t query = i - (task.length - task.queries);
    if (bias.span == Span::kInt32) {
      time_buckets<int32_t, false>(x.query_times[query], x.key_times + first_key, count, t.start.data(),
                                   t.end32.data(), t.shift, t.first_cell, t.steps, bucket);
    } else {
      const int64_t query_time = p.query_times[task.query_begin + query];
      const int64_t* key_times = p.key_times + task.begin + first_key;
      if (bias.span == Span::kInt64) {
        time_buckets<int64_t, false>(query_time, key_times, count, t.start.data(), t.end64.data(), t.shift,
                                     t.first_cell, t.steps, bucket);
      } else {
        time_buckets<int64_t, true>(query_time, key_times, count, t.start.data(), t.end64.data(), t.shift,
                                    t.first_cell, t.steps, bucket);
      }
    }
    const float* table = p.time;
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) s[j] += table[bucket[j]];
  }
}

// s[count ..] = value up to the next whole vector.
template <int W>
GR_INLINE void fill_vector(float* s, int64_t count, float value) {
  for (int64_t j = count; j < round_up(count, W); ++j) s[j] = value;
}

// A row of weights is zero from its last key to where a tile of R or a vector of W may still read it.
template <int W, int R>
GR_INLINE void clear_past(float* s, int64_t count) {
  const int64_t end = std::max(round_up(count, W), count + R);
  for (int64_t j = count; j < end; ++j) s[j] = 0;
}

// Scores to softmax weights in place. The largest score and the sum are found again in the backward pass rather than
// kept as one logarithm: exp(s - log sum) loses digits when scores are large, and its weights don't add up to 1.
template <int W>
GR_INLINE void softmax_row(int64_t count, float* s) {
  fill_vector<W>(s, count, -std::numeric_limits<float>::infinity());
  Float<W> top = load<W>(s);
  for (int64_t j = W; j < count; j += W) top = max<W>(load<W>(s + j), top);
  const float largest_score = largest<W>(top);
  Float<W> total{};
  for (int64_t j = 0; j < count; j += W) {
    const Float<W> e = exp<W>(load<W>(s + j) - largest_score);
    total += e;
    store<W>(s + j, e);
  }
  const float inverse = 1.0f / sum<W>(total);
  for (int64_t j = 0; j < count; j += W) store<W>(s + j, load<W>(s + j) * inverse);
}

template <int W>
GR_INLINE void multiply(const float* factors, int64_t count, float* s) {
  for (int64_t j = 0; j < count; j += W) store<W>(s + j, load<W>(s + j) * load<W>(factors + j));
}

// Scores to weights in place; `keep` are the dropout factors of the row, or null.
template <int W>
GR_INLINE void activate(const Problem& p, int64_t count, const float* keep, float* s) {
  if (p.softmax) {
    softmax_row<W>(count, s);
  } else {
    const float factor = p.inverse_divisor;
    for (int64_t j = 0; j < count; j += W) {
      const Float<W> x = load<W>(s + j);
      store<W>(s + j, x * sigmoid<W>(x) * factor);
    }
  }
  if (keep) multiply<W>(keep, count, s);
}

// Scores s and weight gradients da of a row, in place, to the weights that met the values and to the score gradients.
template <int W>
GR_INLINE void differentiate(const Problem& p, int64_t count, const float* keep, float* s, float* da) {
  if (keep) multiply<W>(keep, count, da);
  if (p.softmax) {
    softmax_row<W>(count, s);
    fill_vector<W>(da, count, 0.0f);
    Float<W> products{};
    for (int64_t j = 0; j < count; j += W) products += load<W>(s + j) * load<W>(da + j);
    const float mean = sum<W>(products);
    for (int64_t j = 0; j < count; j += W) store<W>(da + j, load<W>(s + j) * (load<W>(da + j) - mean));
  } else {
    const float factor = p.inverse_divisor;
    for (int64_t j = 0; j < count; j += W) {
      const Float<W> x = load<W>(s + j);
      const Float<W> gate = sigmoid<W>(x);
      const Float<W> weight = x * gate;
      // SiLU'(x) = sigmoid(x) + silu(x) (1 - sigmoid(x))
      store<W>(da + j, load<W>(da + j) * factor * (gate + weight * (1.0f - gate)));
      store<W>(s + j, weight * factor);
    }
  }
  if (keep) multiply<W>(keep, count, s);
}

// Makes scores of the `count` products that row i has with a block's keys: the bias is added, and in an `own` block
// the score of the row's own key put behind them. Leaves the scores' buckets in x.bucket, and with dropout their
// factors in x.keep. Returns how many scores there are.
template <int W>
GR_INLINE int64_t complete_scores(const Problem& p, const Task& task, const Bias& bias, const Block& block, int64_t i,
                                  int64_t count, Scratch& x, float* s) {
  add_bias<W>(p, task, bias, x, i, 0, count, s, x.bucket);
  if (p.dropout) keep_factors(p, task.begin + i, task.head, 0, count, x.keep);
  if (!block.own) return count;
  const int64_t query = i - (task.length - task.queries);
  s[count] = dot<W>(x.q + query * x.Qp, keys_of(p.k, task) + i * p.k.row, p.Q);
  add_bias<W>(p, task, bias, x, i, i, 1, s + count, x.bucket + count);
  if (p.dropout) {
    float four[4];
    keep_factors(p, task.begin + i, task.head, i / 4, 4, four);
    x.keep[count] = four[i % 4];
  }
  return count + 1;
}

template <int W>
GR_INLINE void forward_task_body(const Problem& p, const Task& task, float* scratch) {
  constexpr int R = TILE_ROWS<W>;
  const int64_t n = task.length, m = task.queries;
  if (m == 0) return;
  Arena arena{scratch, 0};
  Scratch x = carve(arena, n, m, p.Q, p.V, p.bucket_count, W, R, false);
  pack(queries_of(p.q, task), p.q.row, m, p.Q, p.scale, x.padded_queries, x.Qp, x.q);
  pack_transposed(keys_of(p.k, task), p.k.row, n, p.Q, x.stride, x.kt);
  pack(keys_of(p.v, task), p.v.row, n, p.V, 1.0f, x.padded, x.Vp, x.v);
  const Bias bias = prepare_bias(p, task, x);
  Block block{};
  for (int64_t i0 = n - m; i0 < n; i0 += block.rows) {
    block = block_at(p, task, i0);
    const int64_t query = i0 - (n - m), rows = block.rows;
    float own[ROWS];
    block_scores<W, R>(block, x.q + query * x.Qp, p.Q, x.Qp, x.kt, x.stride, x.s);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t i = i0 + r, count = block.causal ? i + 1 : block.keys;
      float* s = x.s + r * x.stride;
      const int64_t seen = complete_scores<W>(p, task, bias, block, i, count, x, s);
      activate<W>(p, seen, p.dropout ? x.keep : nullptr, s);
      if (block.own) own[r] = s[count];
      clear_past<W, R>(s, count);
    }
    for (int64_t r = rows; r < round_up(rows, R); ++r) std::memset(x.s + r * x.stride, 0, x.stride * sizeof(float));
    block_product<W, R>(block, x.s, x.stride, x.v, x.Vp, x.tile);
    if (block.own) add_own<W>(block, own, x.v + i0 * x.Vp, x.Vp, x.tile);
    unpack(x.tile, x.Vp, rows, p.V, 1.0f, p.out + ((task.query_begin + query) * p.H + task.head) * p.V, p.H * p.V);
  }
}

template <int W>
GR_INLINE void backward_task_body(const Problem& p, const Task& task, float* scratch) {
  constexpr int R = TILE_ROWS<W>;
  const int64_t n = task.length, m = task.queries;
  Arena arena{scratch, 0};
  Scratch x = carve(arena, n, m, p.Q, p.V, p.bucket_count, W, R, true);
  pack(queries_of(p.q, task), p.q.row, m, p.Q, p.scale, x.padded_queries, x.Qp, x.q);
  pack(keys_of(p.k, task), p.k.row, n, p.Q, 1.0f, x.padded, x.Qp, x.k);
  pack(queries_of(p.d_out, task), p.d_out.row, m, p.V, 1.0f, x.padded_queries, x.Vp, x.d_out);
  pack_transposed(keys_of(p.k, task), p.k.row, n, p.Q, x.stride, x.kt);
  pack_transposed(keys_of(p.v, task), p.v.row, n, p.V, x.stride, x.vt);
  std::memset(x.d_k, 0, x.padded * x.Qp * sizeof(float));
  std::memset(x.d_v, 0, x.padded * x.Vp * sizeof(float));
  std::memset(x.d_position, 0, (n + x.stride) * sizeof(float));
  std::memset(x.histogram, 0, HISTOGRAMS * p.bucket_count * sizeof(float));
  const Bias bias = prepare_bias(p, task, x);
  Block block{};
  for (int64_t i0 = n - m; i0 < n; i0 += block.rows) {
    block = block_at(p, task, i0);
    const int64_t query = i0 - (n - m), rows = block.rows;
    const float *q = x.q + query * x.Qp, *d_out = x.d_out + query * x.Vp;
    float own_s[ROWS], own_da[ROWS];
    block_scores<W, R>(block, q, p.Q, x.Qp, x.kt, x.stride, x.s);
    block_scores<W, R>(block, d_out, p.V, x.Vp, x.vt, x.stride, x.da);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t i = i0 + r, count = block.causal ? i + 1 : block.keys;
      float *s = x.s + r * x.stride, *da = x.da + r * x.stride;
      const int64_t seen = complete_scores<W>(p, task, bias, block, i, count, x, s);
      if (block.own) da[count] = dot<W>(d_out + r * x.Vp, keys_of(p.v, task) + i * p.v.row, p.V);
      differentiate<W>(p, seen, p.dropout ? x.keep : nullptr, s, da);
      if (p.time) {
        const int64_t copies = p.bucket_count;
        for (int64_t j = 0; j < seen; ++j) x.histogram[(j % HISTOGRAMS) * copies + x.bucket[j]] += da[j];
      }
      if (block.own) {
        own_s[r] = s[count];
        own_da[r] = da[count];
        x.d_position[n - 1] += da[count];
      }
      clear_past<W, R>(s, count);
      clear_past<W, R>(da, count);
      if (p.position) {
        float* entries = x.d_position + (n - 1 - i);
        for (int64_t j = 0; j < count; j += W) store<W>(entries + j, load<W>(entries + j) + load<W>(da + j));
      }
    }
    for (int64_t r = rows; r < round_up(rows, R); ++r) {
      std::memset(x.s + r * x.stride, 0, x.stride * sizeof(float));
      std::memset(x.da + r * x.stride, 0, x.stride * sizeof(float));
    }
    block_product<W, R>(block, x.da, x.stride, x.k, x.Qp, x.tile);
    if (block.own) add_own<W>(block, own_da, x.k + i0 * x.Qp, x.Qp, x.tile);
    unpack(x.tile, x.Qp, rows, p.Q, p.scale, p.d_q + ((task.query_begin + query) * p.H + task.head) * p.Q, p.H * p.Q);
    block_product_transposed<W, R>(block, x.da, x.stride, q, x.Qp, x.d_k);
    block_product_transposed<W, R>(block, x.s, x.stride, d_out, x.Vp, x.d_v);
    if (block.own) {
      add_own<W>(block, own_da, q, x.Qp, x.d_k + i0 * x.Qp);
      add_own<W>(block, own_s, d_out, x.Vp, x.d_v + i0 * x.Vp);
    }
  }
  unpack(x.d_k, x.Qp, n, p.Q, 1.0f, p.d_k + (task.begin * p.H + task.head) * p.Q, p.H * p.Q);
  unpack(x.d_v, x.Vp, n, p.V, 1.0f, p.d_v + (task.begin * p.H + task.head) * p.V, p.H * p.V);
  if (p.position) {
    for (int64_t d = 0; d < n; ++d) task.d_position[d] = x.d_position[n - 1 - d];
  }
  for (int64_t b = 0; b < p.bucket_count; ++b) {
    float total = 0;
    for (int64_t copy = 0; copy < HISTOGRAMS; ++copy) total += x.histogram[copy * p.bucket_count + b];
    task.d_time[b] = total;
  }
}

GR_MULTIVERSION(forward_task, (const Problem& p, const Task& task, float* scratch), (p, task, scratch))
GR_MULTIVERSION(backward_task, (const Problem& p, const Task& task, float* scratch), (p, task, scratch))

Matrix matrix(const at::Tensor& x) { return {x.const_data_ptr<float>(), x.stride(0), x.stride(1)}; }

template <typename T>
const T* data_or_null(const std::optional<at::Tensor>& x) {
  return x ? x->const_data_ptr<T>() : nullptr;
}

// Offsets of `sequences` sequences that stay within `rows` rows.
const int64_t* checked_offsets(const char* name, const at::Tensor& offsets, int64_t sequences, int64_t rows) {
  TORCH_CHECK_VALUE(offsets.dim() == 1 && offsets.scalar_type() == at::kLong && offsets.is_contiguous() &&
                        offsets.numel() == sequences + 1 && sequences >= 0,
                    "hstu_attention: ", name, " must be neighbouring int64, one number more than there are sequences");
  const int64_t* edges = offsets.const_data_ptr<int64_t>();
  TORCH_CHECK_VALUE(edges[0] >= 0 && edges[sequences] <= rows && std::is_sorted(edges, edges + sequences + 1),
                    "hstu_attention: ", name, " must ascend within the ", rows, " rows");
  return edges;
}

// Raises unless every row that a problem names is there; the operator may be called by a traced graph, whose numbers
// nobody has looked at.
void check_rows(const Problem& p, int64_t sequences, int64_t position_entries) {
  for (int64_t b = 0; b < sequences; ++b) {
    const int64_t n = p.offsets[b + 1] - p.offsets[b], m = p.query_offsets[b + 1] - p.query_offsets[b];
    TORCH_CHECK_VALUE(m <= n, "hstu_attention: sequence ", b, " has ", m, " query rows, but they are the last of its ",
                      n, " rows");
    TORCH_CHECK_VALUE(!p.targets || (p.targets[b] >= 0 && p.targets[b] <= n), "hstu_attention: sequence ", b, " has ",
                      n, " rows, of which ", p.targets ? p.targets[b] : 0, " can't be targets");
    TORCH_CHECK_VALUE(!p.position || n <= position_entries, "hstu_attention: sequence ", b, " has ", n,
                      " rows, and the position bias ", position_entries, " entries");
  }
}

// What the two directions have in common; the tensors must outlive the problem.
Problem describe(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& offsets,
                 const std::optional<at::Tensor>& query_offsets, const std::optional<at::Tensor>& targets,
                 const std::optional<at::Tensor>& position, const std::optional<at::Tensor>& time,
                 const std::optional<at::Tensor>& query_times, const std::optional<at::Tensor>& key_times,
                 const std::optional<at::Tensor>& thresholds, double scale, double divisor, bool softmax, bool causal,
                 double dropout, int64_t dropout_key) {
  for (const at::Tensor* x : {&q, &k, &v}) {
    TORCH_CHECK(x->dim() == 3 && x->scalar_type() == at::kFloat && (x->stride(2) == 1 || x->size(2) == 1),
                "hstu_attention: q, k and v are (rows, H, width) float32 with neighbouring widths");
  }
  TORCH_CHECK(k.size(0) == v.size(0) && k.size(1) == v.size(1) && k.size(1) == q.size(1) && k.size(2) == q.size(2) &&
                  (query_offsets || q.size(0) == k.size(0)),
              "hstu_attention: q, k and v don't fit together");
  TORCH_CHECK(causal || !(position || targets), "hstu_attention: a position bias and targets need the causal mask");
  TORCH_CHECK(!time || (query_times && key_times && thresholds && thresholds->numel() + 1 == time->numel() &&
                        query_times->numel() == q.size(0) && key_times->numel() == k.size(0)),
              "hstu_attention: a time bias needs a time a row, and one threshold less than its table has entries");
  const int64_t sequences = offsets.numel() - 1;
  Problem p;
  p.q = matrix(q);
  p.k = matrix(k);
  p.v = matrix(v);
  p.H = q.size(1);
  p.Q = q.size(2);
  p.V = v.size(2);
  p.offsets = checked_offsets("offsets", offsets, sequences, k.size(0));
  p.query_offsets =
      query_offsets ? checked_offsets("query_offsets", *query_offsets, sequences, q.size(0)) : p.offsets;
  TORCH_CHECK_VALUE(!targets || (targets->scalar_type() == at::kLong && targets->is_contiguous() &&
                                 targets->numel() == sequences),
                    "hstu_attention: targets must be neighbouring int64, one number a sequence");
  p.targets = data_or_null<int64_t>(targets);
  p.position = data_or_null<float>(position);
  p.time = data_or_null<float>(time);
  if (time) {
    p.bucket_count = time->numel();
    p.query_times = data_or_null<int64_t>(query_times);
    p.key_times = data_or_null<int64_t>(key_times);
    p.buckets = TimeBucketTable(data_or_null<int64_t>(thresholds), thresholds->numel());
  }
  check_rows(p, sequences, position ? position->numel() : 0);
  p.scale = static_cast<float>(scale);
  p.inverse_divisor = static_cast<float>(1.0 / divisor);
  p.softmax = softmax;
  p.causal = causal;
  p.dropout = dropout > 0;
  p.drop_below = static_cast<uint64_t>(std::ceil(dropout * 4294967296.0));
  p.keep_scale = static_cast<float>(1.0 / (1.0 - dropout));
  p.key0 = static_cast<uint32_t>(dropout_key);
  p.key1 = static_cast<uint32_t>(static_cast<uint64_t>(dropout_key) >> 32);
  return p;
}

// One task per sequence and head, in the order of the batch; `partials` (when given) has room for their bias gradients.
std::vector<Task> tasks_of(const Problem& p, int64_t sequences, float* partials) {
  std::vector<Task> tasks;
  tasks.reserve(sequences * p.H);
  for (int64_t b = 0; b < sequences; ++b) {
    const int64_t begin = p.offsets[b], length = p.offsets[b + 1] - begin;
    const int64_t query_begin = p.query_offsets[b], queries = p.query_offsets[b + 1] - query_begin;
    const int64_t history = length - (p.targets ? p.targets[b] : 0);
    for (int64_t h = 0; length > 0 && h < p.H; ++h) {
      tasks.push_back(
          {begin, length, query_begin, queries, history, h, partials, partials ? partials + length : nullptr});
      if (partials) partials += length + p.bucket_count;
    }
  }
  return tasks;
}

// Runs every task, longest first, on all threads: each takes the next as it becomes free. Which thread runs a task
// changes nothing in its result.
void run_tasks(const Problem& p, const std::vector<Task>& tasks, bool backward) {
  if (tasks.empty()) return;
  std::vector<int64_t> order(tasks.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return tasks[a].length > tasks[b].length; });
  int64_t queries = 0;
  for (const Task& task : tasks) queries = std::max(queries, task.queries);
  Arena size{nullptr, 0};
  carve(size, tasks[order[0]].length, queries, p.Q, p.V, p.bucket_count, 16, 8, backward);  // the largest W and R
  const int64_t floats = size.used + 16;
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), tasks.size());
  at::Tensor scratch = at::empty({threads, floats}, at::kFloat);
  float* base = scratch.data_ptr<float>();
  std::atomic<size_t> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    for (int64_t thread = first; thread < last; ++thread) {
      for (size_t i = next++; i < order.size(); i = next++) {
        (backward ? backward_task : forward_task)(p, tasks[order[i]], base + thread * floats);
      }
    }
  });
}

// Zero in the rows of a (rows, H, width) tensor that belong to no sequence.
void clear_outside(at::Tensor& x, const int64_t* offsets, int64_t sequences) {
  const int64_t first = offsets[0], last = offsets[sequences], rows = x.size(0);
  if (first > 0) x.narrow(0, 0, first).zero_();
  if (last < rows) x.narrow(0, last, rows - last).zero_();
}

// Sums the tasks' partial gradients in the order of the batch, in double, entry by entry.
void reduce_partials(const std::vector<Task>& tasks, bool of_time, at::Tensor& total) {
  float* to = total.data_ptr<float>();
  at::parallel_for(0, total.numel(), 64, [&](int64_t first, int64_t last) {
    std::vector<double> sums(last - first, 0.0);
    for (const Task& task : tasks) {
      const float* part = of_time ? task.d_time : task.d_position;
      const int64_t end = of_time ? last : std::min(last, task.length);
      for (int64_t e = first; e < end; ++e) sums[e - first] += part[e];
    }
    for (int64_t e = first; e < last; ++e) to[e] = static_cast<float>(sums[e - first]);
  });
}

at::Tensor hstu_attention(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& offsets,
    const std::optional<at::Tensor>& query_offsets, const std::optional<at::Tensor>& targets,
    const std::optional<at::Tensor>& position, const std::optional<at::Tensor>& time,
    const std::optional<at::Tensor>& query_times, const std::optional<at::Tensor>& key_times,
    const std::optional<at::Tensor>& thresholds, double scale, double divisor, bool softmax, bool causal,
    double dropout, int64_t dropout_key) {
  Problem p = describe(q, k, v, offsets, query_offsets, targets, position, time, query_times, key_times, thresholds,
                       scale, divisor, softmax, causal, dropout, dropout_key);
  const int64_t sequences = offsets.numel() - 1;
  at::Tensor out = at::empty({q.size(0), p.H, p.V}, v.options());
  p.out = out.data_ptr<float>();
  clear_outside(out, p.query_offsets, sequences);
  run_tasks(p, tasks_of(p, sequences, nullptr), false);
  return out;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> hstu_attention_backward(
    const at::Tensor& d_out, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& offsets,
    const std::optional<at::Tensor>& query_offsets, const std::optional<at::Tensor>& targets,
    const std::optional<at::Tensor>& position, const std::optional<at::Tensor>& time,
    const std::optional<at::Tensor>& query_times, const std::optional<at::Tensor>& key_times,
    const std::optional<at::Tensor>& thresholds, double scale, double divisor, bool softmax, bool causal,
    double dropout, int64_t dropout_key) {
  Problem p = describe(q, k, v, offsets, query_offsets, targets, position, time, query_times, key_times, thresholds,
                       scale, divisor, softmax, causal, dropout, dropout_key);
  const int64_t sequences = offsets.numel() - 1;
  TORCH_CHECK(d_out.dim() == 3 && d_out.size(0) == q.size(0) && d_out.size(1) == p.H && d_out.size(2) == p.V &&
                  d_out.scalar_type() == at::kFloat,
              "hstu_attention: d_out must be like the output");
  const at::Tensor dense_d_out = d_out.contiguous();
  p.d_out = matrix(dense_d_out);
  at::Tensor d_q = at::empty(q.sizes(), q.options());
  at::Tensor d_k = at::empty(k.sizes(), k.options());
  at::Tensor d_v = at::empty(v.sizes(), v.options());
  clear_outside(d_q, p.query_offsets, sequences);
  for (at::Tensor* x : {&d_k, &d_v}) clear_outside(*x, p.offsets, sequences);
  p.d_q = d_q.data_ptr<float>();
  p.d_k = d_k.data_ptr<float>();
  p.d_v = d_v.data_ptr<float>();

  const int64_t rows = p.offsets[sequences] - p.offsets[0];
  at::Tensor partials = at::empty({(rows + sequences * p.bucket_count) * p.H}, q.options());
  const std::vector<Task> tasks = tasks_of(p, sequences, partials.data_ptr<float>());
  run_tasks(p, tasks, true);

  at::Tensor d_position = at::empty({position ? position->numel() : 0}, q.options());
  at::Tensor d_time = at::empty({p.bucket_count}, q.options());
  if (position) reduce_partials(tasks, false, d_position);
  if (time) reduce_partials(tasks, true, d_time);
  return {d_q, d_k, d_v, d_position, d_time};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(gr_kernels, library) {
  library.def(
      "hstu_attention(Tensor q, Tensor k, Tensor v, Tensor offsets, Tensor? query_offsets, Tensor? targets, "
      "Tensor? position, Tensor? time, Tensor? query_times, Tensor? key_times, Tensor? thresholds, float scale, "
      "float divisor, bool softmax, bool causal, float dropout, SymInt dropout_key) -> Tensor");
  library.def(
      "hstu_attention_backward(Tensor d_out, Tensor q, Tensor k, Tensor v, Tensor offsets, Tensor? query_offsets, "
      "Tensor? targets, Tensor? position, Tensor? time, Tensor? query_times, Tensor? key_times, Tensor? thresholds, "
      "float scale, float divisor, bool softmax, bool causal, float dropout, SymInt dropout_key) "
      "-> (Tensor d_q, Tensor d_k, Tensor d_v, Tensor d_position, Tensor d_time)");
}

TORCH_LIBRARY_IMPL(gr_kernels, CPU, library) {
  library.impl("hstu_attention", &hstu_attention);
  library.impl("hstu_attention_backward", &hstu_attention_backward);
}

}  // namespace gr
