// Scores of queries against their own candidate rows of a table, and their gradients, float32:
// kernels/gr_kernels/candidate_scores.
//
// T queries, K candidates of a query, I rows of the table, D width. score[t, k] = q_t . e_r / max(|e_r|, eps) with
// r = rows[t, k]; without normalisation the divisor is 1. No T x K x D tensor exists.
//
// The table's gradient is a sum over (t, k) scattered by row. It is made without races and without an order that
// depends on threads: the pairs are partitioned, stably, by buckets of consecutive rows (one pass of a radix sort),
// and each bucket is summed by one thread, in the order of t, into sums that stay in its cache. The same bits come
// out for any number of threads.
#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "simd.h"

namespace {

using gr::Float;
using gr::Int;
using gr::load;
using gr::store;

constexpr int64_t kBucketBytes = 256 << 10;        // sums of one bucket: within a core's L2
constexpr int64_t kBlockPairs = 1 << 19;           // (query, candidate) pairs whose terms are sorted at a time
constexpr int64_t kCachedTableBytes = 1 << 20;     // a table above this is prefetched row by row
constexpr int64_t kPrefetchRows = 32;              // how far ahead
constexpr int64_t kNoRow = std::numeric_limits<int64_t>::max();

// ---- Vectors over a row -------------------------------------------------------------------------------------------
// A row of D floats is covered by ceil(D / W) vectors; the last one starts at D - W and overlaps its neighbour, so
// that no load or store leaves the row. W <= D always (`with_width`).

template <int W>
GR_INLINE int64_t slots(int64_t width) { return (width + W - 1) / W; }

template <int W>
GR_INLINE int64_t slot_start(int64_t slot, int64_t width) { return std::min(slot * W, width - W); }

// Ones in the lanes of the last vector that its neighbour does not cover.
template <int W>
GR_INLINE Int<W> last_mask(int64_t width) {
  const int fresh = int(width - (slots<W>(width) - 1) * W);
  return gr::iota<W>() >= (W - fresh);
}

template <int W>
GR_INLINE Float<W> masked(Float<W> v, Int<W> mask) { return (Float<W>)((Int<W>)v & mask); }

// Lanes of a and b folded onto stretches of H: where lane & H is 0 the sums a[l] + a[l + H], else b[l - H] + b[l].
template <int W, int H, int... L>
GR_INLINE Float<W> fold(Float<W> a, Float<W> b, std::integer_sequence<int, L...>) {
  return __builtin_shufflevector(a, b, ((L & H) ? W + L - H : L)...) +
         __builtin_shufflevector(a, b, ((L & H) ? W + L : L + H)...);
}

// Lane i of the result is the sum of the lanes of v[i]: a transposition by halves. Destroys v.
template <int W, int H = W / 2>
GR_INLINE Float<W> sum_each(Float<W>* v) {
  if constexpr (H == 0) {
    return v[0];
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < H; ++i) v[i] = fold<W, H>(v[i], v[i + H], std::make_integer_sequence<int, W>{});
    return sum_each<W, H / 2>(v);
  }
}

// out[i] = a_i . b_i for W pairs of rows; SELF: a_i = b_i, else a_i = a for all.
template <int W, bool SELF>
GR_INLINE Float<W> dots(const float* a, const float* const* b, int64_t width) {
  Float<W> sums[W];
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) sums[i] = Float<W>{};
  const int64_t whole = slots<W>(width) - 1;
  for (int64_t slot = 0; slot < whole; ++slot) {
    const Float<W> left = SELF ? Float<W>{} : load<W>(a + slot * W);
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) {
      const Float<W> right = load<W>(b[i] + slot * W);
      sums[i] += (SELF ? right : left) * right;
    }
  }
  const int64_t start = width - W;
  const Int<W> mask = last_mask<W>(width);
  const Float<W> left = SELF ? Float<W>{} : masked<W>(load<W>(a + start), mask);
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) {
    const Float<W> right = masked<W>(load<W>(b[i] + start), mask);
    sums[i] += (SELF ? right : left) * right;
  }
  return sum_each<W>(sums);
}

// One pair of rows, with the bits `dots` gives it.
template <int W>
GR_INLINE float one_dot(const float* a, const float* b, int64_t width) {
  Float<W> sums{};
  const int64_t whole = slots<W>(width) - 1;
  for (int64_t slot = 0; slot < whole; ++slot) sums += load<W>(a + slot * W) * load<W>(b + slot * W);
  const Int<W> mask = last_mask<W>(width);
  sums += masked<W>(load<W>(a + width - W), mask) * masked<W>(load<W>(b + width - W), mask);
  return gr::sum<W>(sums);
}

// Calls Body<w>::run for the widest w <= W that fits into a row.
template <int W, template <int> class Body, class... Args>
GR_INLINE void with_width(int64_t width, Args&&... args) {
  if (W >= 16 && width >= 16) return Body<(W >= 16 ? 16 : W)>::run(args...);
  if (W >= 8 && width >= 8) return Body<(W >= 8 ? 8 : W)>::run(args...);
  if (width >= 4) return Body<4>::run(args...);
  return Body<1>::run(args...);
}

// ---- Inverse norms --------------------------------------------------------------------------------------------------
// 1 / max(norm, eps), negative where the divisor is the constant eps and the gradient does not pass through the norm.

GR_INLINE float inverse_norm(float squared, float eps) {
  const float norm = std::sqrt(squared);
  return norm < eps ? -1.0f / eps : 1.0f / norm;  // NaN: not below, stays NaN
}

// ---- Forward --------------------------------------------------------------------------------------------------------

template <class Row>
struct Forward {
  const float* queries;  // T x D
  const float* table;    // I x D
  const Row* rows;       // T x K
  int64_t candidates, catalogue, width;
  float* inverse;        // I, set for the rows met; null: no normalisation
  float eps;
  float* scores;         // T x K
};

GR_INLINE void prefetch_row(const float* row, int64_t width) {
  const char* bytes = reinterpret_cast<const char*>(row);
  for (int64_t i = 0; i < width * 4; i += 64) __builtin_prefetch(bytes + i);
}

template <class Row>
GR_INLINE int64_t first_bad(const Row* rows, int64_t count, int64_t catalogue) {
  bool bad = false;
  for (int64_t i = 0; i < count; ++i) bad |= uint64_t(int64_t(rows[i])) >= uint64_t(catalogue);
  if (!bad) return kNoRow;
  int64_t i = 0;
  while (uint64_t(int64_t(rows[i])) < uint64_t(catalogue)) ++i;
  return i;
}

template <class Row>
struct ScoreTokens {
  template <int W>
  struct Body {
    // Queries [begin, end). Returns in *bad the flat index of the first row outside the table, where it stops.
    GR_INLINE void run(const Forward<Row>& f, int64_t begin, int64_t end, int64_t* bad) {
      const int64_t K = f.candidates, D = f.width;
      const bool prefetch = f.catalogue * D * 4 > kCachedTableBytes;
      const Row* last = f.rows + end * K;
      for (int64_t t = begin; t < end; ++t) {
        const Row* rows = f.rows + t * K;
        const int64_t wrong = first_bad(rows, K, f.catalogue);
        if (wrong != kNoRow) {
          *bad = t * K + wrong;
          return;
        }
        const float* query = f.queries + t * D;
        float* scores = f.scores + t * K;
        for (int64_t k = 0; k < K; k += W) {
          const int count = int(std::min<int64_t>(W, K - k));
          const float* group[W];
          for (int i = 0; i < W; ++i) group[i] = f.table + int64_t(rows[k + std::min(i, count - 1)]) * D;
          if (prefetch) {
            const Row* ahead = rows + k + kPrefetchRows;
            const Row* stop = std::min(ahead + W, last);
            for (; ahead < stop; ++ahead) prefetch_row(f.table + int64_t(*ahead) * D, D);
          }
          float squares[W], lanes[W];
          if (count <= W / 4) {
            for (int i = 0; i < count; ++i) {
              if (f.inverse) squares[i] = one_dot<W>(group[i], group[i], D);
              lanes[i] = one_dot<W>(query, group[i], D);
            }
          } else {
            if (f.inverse) store<W>(squares, dots<W, true>(nullptr, group, D));  // the rows are in L1 for the next
            store<W>(lanes, dots<W, false>(query, group, D));
          }
          for (int i = 0; f.inverse && i < count; ++i) {
            const float inverse = inverse_norm(squares[i], f.eps);
            // several threads may meet a row; all store the same bits
            __atomic_store(&f.inverse[rows[k + i]], &inverse, __ATOMIC_RELAXED);
            lanes[i] *= std::fabs(inverse);
          }
          std::memcpy(scores + k, lanes, sizeof(float) * size_t(count));
        }
      }
    }
  };
};

template <int W>
GR_INLINE void score_tokens_long_body(const Forward<int64_t>& f, int64_t begin, int64_t end, int64_t* bad) {
  with_width<W, ScoreTokens<int64_t>::Body>(f.width, f, begin, end, bad);
}
template <int W>
GR_INLINE void score_tokens_int_body(const Forward<int32_t>& f, int64_t begin, int64_t end, int64_t* bad) {
  with_width<W, ScoreTokens<int32_t>::Body>(f.width, f, begin, end, bad);
}
GR_MULTIVERSION(score_tokens_long, (const Forward<int64_t>& f, int64_t begin, int64_t end, int64_t* bad),
                (f, begin, end, bad))
GR_MULTIVERSION(score_tokens_int, (const Forward<int32_t>& f, int64_t begin, int64_t end, int64_t* bad),
                (f, begin, end, bad))

void score_tokens(const Forward<int64_t>& f, int64_t begin, int64_t end, int64_t* bad) {
  score_tokens_long(f, begin, end, bad);
}
void score_tokens(const Forward<int32_t>& f, int64_t begin, int64_t end, int64_t* bad) {
  score_tokens_int(f, begin, end, bad);
}

// ---- Backward -------------------------------------------------------------------------------------------------------

// One term of the table's gradient: weight * q_token is added to a row of the bucket.
struct Term {
  int32_t row;    // within the bucket
  int32_t token;
  float weight;   // the score's gradient / max(|e|, eps)
};

template <class Row>
struct Backward {
  const float* grad;       // T x K
  const float* queries;    // T x D
  const float* table;      // I x D
  const Row* rows;         // T x K
  const float* inverse;    // I, or null
  int64_t candidates, catalogue, width;
  float* grad_queries;     // T x D, or null
  int bucket_shift;        // a bucket is 2^shift rows
  Term* terms;             // T x K, bucket by bucket; null: no gradient of the table
};

// dq[slots FIRST .. FIRST + NV) of one query = sum_k weight_k e_k.
template <int W, int NV>
GR_INLINE void sum_rows(const float* weights, const float* const* group, int64_t count, int64_t first, int64_t width,
                        float* out) {
  Float<W> sums[NV];
  int64_t starts[NV];
#pragma GCC unroll 8
  for (int v = 0; v < NV; ++v) {
    starts[v] = slot_start<W>(first + v, width);
    sums[v] = load<W>(out + starts[v]);
  }
  for (int64_t k = 0; k < count; ++k) {
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) sums[v] += weights[k] * load<W>(group[k] + starts[v]);
  }
#pragma GCC unroll 8
  for (int v = 0; v < NV; ++v) store<W>(out + starts[v], sums[v]);
}

// Overlapping slots are loaded before any is stored within a call; a call ends before the overlap or holds both.
template <int W>
GR_INLINE void sum_all_slots(const float* weights, const float* const* group, int64_t count, int64_t width,
                             float* out) {
  int64_t first = 0, left = slots<W>(width);
  for (; left > 8; left -= 4, first += 4) sum_rows<W, 4>(weights, group, count, first, width, out);
  switch (left) {
    case 8: return sum_rows<W, 8>(weights, group, count, first, width, out);
    case 7: return sum_rows<W, 7>(weights, group, count, first, width, out);
    case 6: return sum_rows<W, 6>(weights, group, count, first, width, out);
    case 5: return sum_rows<W, 5>(weights, group, count, first, width, out);
    case 4: return sum_rows<W, 4>(weights, group, count, first, width, out);
    case 3: return sum_rows<W, 3>(weights, group, count, first, width, out);
    case 2: return sum_rows<W, 2>(weights, group, count, first, width, out);
    default: return sum_rows<W, 1>(weights, group, count, first, width, out);
  }
}

constexpr int kGroup = 32;  // candidates whose weights and addresses are prepared together

template <class Row>
struct QueryGradients {
  template <int W>
  struct Body {
    // Queries [begin, end): their gradients, and their terms put where `next` says for each bucket.
    GR_INLINE void run(const Backward<Row>& f, int64_t begin, int64_t end, int64_t* next) {
      const int64_t K = f.candidates, D = f.width;
      const bool prefetch = f.grad_queries && f.catalogue * D * 4 > kCachedTableBytes;
      const Row* last = f.rows + end * K;
      const int64_t in_bucket = (int64_t{1} << f.bucket_shift) - 1;
      for (int64_t t = begin; t < end; ++t) {
        float* out = f.grad_queries ? f.grad_queries + t * D : nullptr;
        if (out) std::fill(out, out + D, 0.0f);
        for (int64_t k = 0; k < K; k += kGroup) {
          const int count = int(std::min<int64_t>(kGroup, K - k));
          const Row* rows = f.rows + t * K + k;
          const float* grad = f.grad + t * K + k;
          float weights[kGroup];
          for (int i = 0; i < count; ++i) {
            weights[i] = f.inverse ? grad[i] * std::fabs(f.inverse[rows[i]]) : grad[i];
          }
          if (prefetch) {
            const Row* ahead = rows + kPrefetchRows;
            const Row* stop = std::min(ahead + kGroup, last);
            for (; ahead < stop; ++ahead) prefetch_row(f.table + int64_t(*ahead) * D, D);
          }
          if (f.terms) {
            for (int i = 0; i < count; ++i) {
              const int64_t row = rows[i];
              f.terms[next[row >> f.bucket_shift]++] = {int32_t(row & in_bucket), int32_t(t), weights[i]};
            }
          }
          if (out) {
            const float* group[kGroup];
            for (int i = 0; i < count; ++i) group[i] = f.table + int64_t(rows[i]) * D;
            sum_all_slots<W>(weights, group, count, D, out);
          }
        }
      }
    }
  };
};

template <int W>
GR_INLINE void query_gradients_long_body(const Backward<int64_t>& f, int64_t begin, int64_t end, int64_t* next) {
  with_width<W, QueryGradients<int64_t>::Body>(f.width, f, begin, end, next);
}
template <int W>
GR_INLINE void query_gradients_int_body(const Backward<int32_t>& f, int64_t begin, int64_t end, int64_t* next) {
  with_width<W, QueryGradients<int32_t>::Body>(f.width, f, begin, end, next);
}
GR_MULTIVERSION(query_gradients_long, (const Backward<int64_t>& f, int64_t begin, int64_t end, int64_t* next),
                (f, begin, end, next))
GR_MULTIVERSION(query_gradients_int, (const Backward<int32_t>& f, int64_t begin, int64_t end, int64_t* next),
                (f, begin, end, next))

void query_gradients(const Backward<int64_t>& f, int64_t begin, int64_t end, int64_t* next) {
  query_gradients_long(f, begin, end, next);
}
void query_gradients(const Backward<int32_t>& f, int64_t begin, int64_t end, int64_t* next) {
  query_gradients_int(f, begin, end, next);
}

// The terms of one block of queries that fall into one bucket.
struct Bucket {
  const Term* terms;
  int64_t count;
  const float* queries;
  int64_t width;
  float* sums;  // the bucket's rows of the table's gradient
};

// sums[row] += weight * q over the terms, in their order.
template <int W, int NV>
GR_INLINE void scatter_terms(const Bucket& b) {
  int64_t starts[NV];
#pragma GCC unroll 8
  for (int v = 0; v < NV; ++v) starts[v] = slot_start<W>(v, b.width);
  for (int64_t i = 0; i < b.count; ++i) {
    const Term term = b.terms[i];
    const float* query = b.queries + int64_t(term.token) * b.width;
    float* sums = b.sums + int64_t(term.row) * b.width;
    Float<W> added[NV];
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) added[v] = load<W>(sums + starts[v]) + term.weight * load<W>(query + starts[v]);
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) store<W>(sums + starts[v], added[v]);
  }
}

// y += alpha * x over a row: the last two vectors may overlap, so both are loaded before either is stored.
template <int W>
GR_INLINE void add_row(float alpha, const float* x, float* y, int64_t width) {
  const int64_t last = slots<W>(width) - 1;
  for (int64_t v = 0; v + 1 < last; ++v) store<W>(y + v * W, load<W>(y + v * W) + alpha * load<W>(x + v * W));
  const int64_t before = last > 0 ? (last - 1) * W : 0, end = width - W;
  const Float<W> left = load<W>(y + before) + alpha * load<W>(x + before);
  const Float<W> right = load<W>(y + end) + alpha * load<W>(x + end);
  store<W>(y + before, left);
  store<W>(y + end, right);
}

template <int W>
struct SumBucket {
  GR_INLINE void run(const Bucket& b) {
    switch (slots<W>(b.width)) {
      case 1: return scatter_terms<W, 1>(b);
      case 2: return scatter_terms<W, 2>(b);
      case 3: return scatter_terms<W, 3>(b);
      case 4: return scatter_terms<W, 4>(b);
      case 8: return scatter_terms<W, 8>(b);
      default:
        for (int64_t i = 0; i < b.count; ++i) {
          const Term term = b.terms[i];
          add_row<W>(term.weight, b.queries + int64_t(term.token) * b.width, b.sums + int64_t(term.row) * b.width,
                     b.width);
        }
    }
  }
};

template <int W>
GR_INLINE void sum_bucket_body(const Bucket& b) {
  with_width<W, SumBucket>(b.width, b);
}
GR_MULTIVERSION(sum_bucket, (const Bucket& b), (b))

// The way through the norm: with G the sum of the terms (each divided by |e| already), dE = G - (G . e) e / |e|^2.
template <int W>
struct ThroughNorm {
  GR_INLINE void run(const float* table, const float* inverse, const uint8_t* met, int64_t rows, int64_t width,
                     float* grad) {
    for (int64_t row = 0; row < rows; ++row) {
      if (!met[row] || inverse[row] < 0) continue;  // below 0: the divisor was the constant eps
      const float* e = table + row * width;
      float* g = grad + row * width;
      add_row<W>(-one_dot<W>(g, e, width) * inverse[row] * inverse[row], e, g, width);
    }
  }
};

template <int W>
GR_INLINE void through_norm_body(const float* table, const float* inverse, const uint8_t* met, int64_t rows,
                                 int64_t width, float* grad) {
  with_width<W, ThroughNorm>(width, table, inverse, met, rows, width, grad);
}
GR_MULTIVERSION(through_norm,
                (const float* table, const float* inverse, const uint8_t* met, int64_t rows, int64_t width, float* grad),
                (table, inverse, met, rows, width, grad))

// ---- Operators ------------------------------------------------------------------------------------------------------

// Asks for huge pages: a fresh gradient of a large table costs more in page faults than in arithmetic.
void prefer_huge_pages(const at::Tensor& tensor) {
#ifdef __linux__
  constexpr uintptr_t page = uintptr_t{2} << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(tensor.data_ptr());
  const uintptr_t first = (begin + page - 1) / page * page, last = (begin + tensor.nbytes()) / page * page;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

template <class Row>
void forward_rows(const at::Tensor& queries, const at::Tensor& table, const at::Tensor& rows, at::Tensor& scores,
                  float* inverse, float eps) {
  const int64_t K = rows.size(1), catalogue = table.size(0);
  const Forward<Row> f{queries.const_data_ptr<float>(), table.const_data_ptr<float>(), rows.const_data_ptr<Row>(), K,
                       catalogue, table.size(1), inverse, eps, scores.mutable_data_ptr<float>()};
  std::atomic<int64_t> first{kNoRow};
  at::parallel_for(0, rows.size(0), std::max<int64_t>(1, 4096 / K), [&](int64_t begin, int64_t end) {
    int64_t bad = kNoRow;
    score_tokens(f, begin, end, &bad);
    int64_t seen = first.load();
    while (bad < seen && !first.compare_exchange_weak(seen, bad)) {
    }
  });
  const int64_t bad = first.load();
  TORCH_CHECK_INDEX(bad == kNoRow, "candidate row ", int64_t(f.rows[bad == kNoRow ? 0 : bad]), " (query ", bad / K,
                    ", candidate ", bad % K, ") is outside the table of ", catalogue, " rows: rows must lie in [0, ",
                    catalogue, ")");
}

std::tuple<at::Tensor, at::Tensor> forward_outputs(const at::Tensor& queries, const at::Tensor& table,
                                                   const at::Tensor& rows, std::optional<double> eps) {
  return {at::empty_symint(rows.sym_sizes(), queries.options()),
          at::empty_symint({eps ? table.sym_size(0) : c10::SymInt(0)}, queries.options())};
}

void check(const at::Tensor& queries, const at::Tensor& table, const at::Tensor& rows) {
  TORCH_CHECK_VALUE(queries.dim() == 2 && table.dim() == 2 && rows.dim() == 2 && queries.size(1) == table.size(1) &&
                        queries.size(0) == rows.size(0),
                    "candidate_scores takes queries (T, D), a table (I, D) and rows (T, K)");
  TORCH_CHECK_TYPE(queries.scalar_type() == at::kFloat && table.scalar_type() == at::kFloat &&
                       (rows.scalar_type() == at::kLong || rows.scalar_type() == at::kInt),
                   "candidate_scores takes float32 queries and table, and int64 or int32 rows");
  TORCH_CHECK_VALUE(queries.is_contiguous() && table.is_contiguous() && rows.is_contiguous(),
                    "candidate_scores takes contiguous tensors");
  TORCH_CHECK_VALUE(queries.size(0) <= std::numeric_limits<int32_t>::max(), "candidate_scores: too many queries");
}

std::tuple<at::Tensor, at::Tensor> candidate_scores(const at::Tensor& queries, const at::Tensor& table,
                                                    const at::Tensor& rows, std::optional<double> eps) {
  check(queries, table, rows);
  auto [scores, inverse] = forward_outputs(queries, table, rows, eps);
  if (rows.numel() == 0) return {scores, inverse};
  if (table.size(1) == 0) return {scores.zero_(), inverse.fill_(-1.0 / eps.value_or(1.0))};
  float* norms = eps ? inverse.mutable_data_ptr<float>() : nullptr;
  if (rows.scalar_type() == at::kLong) {
    forward_rows<int64_t>(queries, table, rows, scores, norms, float(eps.value_or(0)));
  } else {
    forward_rows<int32_t>(queries, table, rows, scores, norms, float(eps.value_or(0)));
  }
  return {scores, inverse};
}

// Runs task(0), ..., task(count - 1), each on whichever thread is free: for tasks whose results do not depend on it.
template <class Task>
void share_out(int64_t count, const Task& task) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(count, at::get_num_threads()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      for (int64_t i = next++; i < count; i = next++) task(i);
    }
  });
}

template <class Row>
void backward_rows(const at::Tensor& grad, const at::Tensor& queries, const at::Tensor& table, const at::Tensor& rows,
                   const at::Tensor& inverse, at::Tensor& grad_queries, at::Tensor& grad_table) {
  const int64_t tokens = rows.size(0), K = rows.size(1), catalogue = table.size(0), width = table.size(1);
  const bool want_table = grad_table.numel() > 0;
  const Row* row_data = rows.const_data_ptr<Row>();
  const float* norms = inverse.numel() ? inverse.const_data_ptr<float>() : nullptr;
  int shift = 0;
  while ((int64_t{2} << shift) * width * 4 <= kBucketBytes) ++shift;
  const int64_t buckets = want_table ? ((catalogue - 1) >> shift) + 1 : 0;
  const auto bucket_rows = [&](int64_t bucket) { return std::min(catalogue - (bucket << shift), int64_t{1} << shift); };

  // Queries come in blocks whose terms stay in cache, but outnumber the rows that each block goes over again.
  const int64_t block_pairs = want_table ? std::max(kBlockPairs, 2 * catalogue) : tokens * K;
  const int64_t block_tokens = std::clamp<int64_t>(block_pairs / K, 1, tokens);
  const int64_t parts = std::min<int64_t>(block_tokens, at::get_num_threads());
  at::Tensor term_bytes = at::empty({want_table ? block_tokens * K * int64_t(sizeof(Term)) : 0}, at::kByte);
  prefer_huge_pages(term_bytes);
  Term* terms = want_table ? reinterpret_cast<Term*>(term_bytes.mutable_data_ptr<uint8_t>()) : nullptr;
  std::vector<int64_t> next(size_t(parts * buckets)), bucket_start(size_t(buckets + 1));
  std::vector<uint8_t> met(want_table && norms ? size_t(catalogue) : 0);
  float* sums = want_table ? grad_table.mutable_data_ptr<float>() : nullptr;
  if (want_table) prefer_huge_pages(grad_table);

  const Backward<Row> f{grad.const_data_ptr<float>(), queries.const_data_ptr<float>(), table.const_data_ptr<float>(),
                        row_data, norms, K, catalogue, width,
                        grad_queries.numel() ? grad_queries.mutable_data_ptr<float>() : nullptr, shift, terms};
  for (int64_t first = 0; first < tokens; first += block_tokens) {
    const int64_t count = std::min(block_tokens, tokens - first);
    const auto part_start = [&](int64_t part) { return first + count * part / parts; };  // a stretch of queries
    if (want_table) {
      at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
        for (int64_t part = begin; part < end; ++part) {
          int64_t* counts = next.data() + part * buckets;
          std::fill(counts, counts + buckets, 0);
          for (int64_t i = part_start(part) * K; i < part_start(part + 1) * K; ++i) ++counts[row_data[i] >> shift];
        }
      });
      int64_t total = 0;  // counts become places: bucket by bucket, within a bucket part by part
      for (int64_t bucket = 0; bucket < buckets; ++bucket) {
        bucket_start[bucket] = total;
        for (int64_t part = 0; part < parts; ++part) total += std::exchange(next[part * buckets + bucket], total);
      }
      bucket_start[buckets] = total;
    }
    at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) {
        query_gradients(f, part_start(part), part_start(part + 1), next.data() + part * buckets);
      }
    });
    share_out(buckets, [&](int64_t bucket) {
      const int64_t row = bucket << shift, here = bucket_rows(bucket);
      float* bucket_sums = sums + row * width;
      if (first == 0) std::fill(bucket_sums, bucket_sums + here * width, 0.0f);
      const Bucket b{terms + bucket_start[bucket], bucket_start[bucket + 1] - bucket_start[bucket], f.queries, width,
                     bucket_sums};
      sum_bucket(b);
      if (!norms) return;
      for (int64_t i = 0; i < b.count; ++i) met[row + b.terms[i].row] = 1;
      if (first + count == tokens) {
        through_norm(f.table + row * width, norms + row, met.data() + row, here, width, bucket_sums);
      }
    });
  }
}

std::tuple<at::Tensor, at::Tensor> backward_outputs(const at::Tensor& queries, const at::Tensor& table,
                                                    bool want_queries, bool want_table) {
  return {want_queries ? at::empty_symint(queries.sym_sizes(), queries.options()) : at::empty({0}, queries.options()),
          want_table ? at::empty_symint(table.sym_sizes(), table.options()) : at::empty({0}, table.options())};
}

// rows are those the forward pass has checked.
std::tuple<at::Tensor, at::Tensor> candidate_scores_backward(const at::Tensor& grad, const at::Tensor& queries,
                                                             const at::Tensor& table, const at::Tensor& rows,
                                                             const at::Tensor& inverse, bool want_queries,
                                                             bool want_table) {
  check(queries, table, rows);
  TORCH_CHECK_VALUE(grad.is_contiguous() && grad.sizes() == rows.sizes() && grad.scalar_type() == at::kFloat,
                    "candidate_scores_backward takes a contiguous float32 gradient of the shape of rows");
  auto [grad_queries, grad_table] = backward_outputs(queries, table, want_queries, want_table);
  if (rows.numel() == 0 || table.size(1) == 0) return {grad_queries.zero_(), grad_table.zero_()};
  if (rows.scalar_type() == at::kLong) {
    backward_rows<int64_t>(grad, queries, table, rows, inverse, grad_queries, grad_table);
  } else {
    backward_rows<int32_t>(grad, queries, table, rows, inverse, grad_queries, grad_table);
  }
  return {grad_queries, grad_table};
}

std::tuple<at::Tensor, at::Tensor> candidate_scores_backward_meta(const at::Tensor&, const at::Tensor& queries,
                                                                  const at::Tensor& table, const at::Tensor&,
                                                                  const at::Tensor&, bool want_queries,
                                                                  bool want_table) {
  return backward_outputs(queries, table, want_queries, want_table);
}

TORCH_LIBRARY_FRAGMENT(gr_kernels, m) {
  m.def("candidate_scores(Tensor queries, Tensor table, Tensor rows, float? normalize_eps) -> (Tensor, Tensor)");
  m.def(
      "candidate_scores_backward(Tensor grad, Tensor queries, Tensor table, Tensor rows, Tensor inverse, "
      "bool want_queries, bool want_table) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(gr_kernels, CPU, m) {
  m.impl("candidate_scores", candidate_scores);
  m.impl("candidate_scores_backward", candidate_scores_backward);
}

TORCH_LIBRARY_IMPL(gr_kernels, Meta, m) {
  m.impl("candidate_scores", forward_outputs);
  m.impl("candidate_scores_backward", candidate_scores_backward_meta);
}

}  // namespace
