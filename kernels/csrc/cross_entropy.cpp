// Softmax over a whole catalogue on CPU, float32: values and gradients in one go, without T x I storage. See
// gr_kernels/log_partition/README.md for the maths.
//
// Queries are taken in blocks. A block forms its scores against a tile of items in its own scratch (all items when
// they fit: then each score is computed once; else the scores of every tile are formed twice, first for the softmax's
// sums, then for the gradients), turns them into exponentials and multiplies them with the table: its queries'
// gradients; the exponentials transposed, times the queries, are added to the table's gradient strip by strip. Blocks
// and stretches of blocks are cut by the inputs' sizes alone, so no sum's order depends on the number of threads.
//
// T queries, I items, D width, padded: D rounded up to whole vectors, W float lanes, R rows of a register tile.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <tuple>

#include "simd.h"

namespace gr {
namespace {

constexpr int64_t PANEL = 32;  // items of a panel of the transposed table: (D, PANEL) floats, which stay in L1
constexpr int64_t STRIP = 128;  // items of a strip of scores: one row of scores is contiguous within a strip
constexpr int64_t STRIDE = STRIP + 16;  // floats between a strip's rows; a power of two would fight over cache sets
constexpr int64_t TILE_SCORES = int64_t{1} << 18;  // scores a block holds at most: 1 MiB
constexpr int64_t BLOCKS_A_THREAD = 8;  // blocks between two meetings of the threads, where they share a stretch
constexpr int64_t MAX_STRETCHES = 16, STRETCH_BLOCKS = 4;  // at most so many stretches, of so many blocks at least
constexpr int64_t STRETCH_BYTES = int64_t{64} << 20;  // what the stretches' sums of the table's gradient may take
constexpr int64_t MAX_BLOCK = 32, MIN_BLOCK = 16;  // queries of a block that holds all its scores
constexpr int64_t LONG_BLOCK = 128;  // queries of a block that forms its scores twice
constexpr float INFINITE = std::numeric_limits<float>::infinity();

template <int W>
constexpr int TILE_ROWS = W == 16 ? 8 : 4;

struct Problem {
  const float* queries = nullptr;  // (T, D)
  const float* panels = nullptr;  // (I / PANEL, D, PANEL): the table transposed, zero past its last row
  const float* table = nullptr;  // (I, padded), zero past D
  const float* bias = nullptr;  // (I) or null
  const int64_t* targets = nullptr;  // (T) or null
  const float* weights = nullptr;  // (T) or null
  float scale = 1;
  int64_t T = 0, I = 0, D = 0, padded = 0;
  int64_t block = 0, tile = 0;  // queries of a block, items of a tile (whole strips)
  float* values = nullptr;  // (T)
  float* d_queries = nullptr;  // (T, D) or null
  float* d_table = nullptr;  // (I, padded) or null
  float* d_bias = nullptr;  // (I rounded up to PANEL) or null

  bool keeps_scores() const { return tile >= I; }
};

// What one block works with.
struct Block {
  int64_t first, rows;  // its queries
  float *scores;  // (strips of a tile, rows, STRIDE)
  float *scaled, *weighted, *d_queries;  // (rows, padded): scale q; scale q weight / sum; sum_i exp e_i
  float *peaks, *sums, *labels, *factors, *new_peaks;  // (rows): factors are weight / sum
};

int64_t block_floats(const Problem& p) {
  return p.tile / STRIP * p.block * STRIDE + 3 * p.block * p.padded + 5 * round_up(p.block, 16);
}

Block carve(const Problem& p, int64_t first, float* scratch) {
  Block b{first, std::min(p.block, p.T - first)};
  const auto take = [&](int64_t count) {
    float* piece = scratch;
    scratch += count;
    return piece;
  };
  b.scores = take(p.tile / STRIP * p.block * STRIDE);
  for (float** matrix : {&b.scaled, &b.weighted, &b.d_queries}) *matrix = take(p.block * p.padded);
  for (float** row : {&b.peaks, &b.sums, &b.labels, &b.factors, &b.new_peaks}) *row = take(round_up(p.block, 16));
  return b;
}

GR_INLINE float* strip_of(const Block& b, int64_t strip) { return b.scores + strip * b.rows * STRIDE; }

// The block's scores against the items from tile_first on, their largest (with peaks) in new_peaks, and the labels.
template <int W>
GR_INLINE void form_scores(const Problem& p, const Block& b, int64_t tile_first) {
  const int64_t tile_last = std::min(p.I, tile_first + p.tile);
  float tops[LONG_BLOCK * W];
  for (int64_t r = 0; r < b.rows; ++r) store<W>(tops + r * W, broadcast<W>(b.peaks[r]));
  for (int64_t first = tile_first; first < tile_last; first += STRIP) {
    float* strip = strip_of(b, (first - tile_first) / STRIP);
    const int64_t items = std::min(STRIP, tile_last - first), columns = round_up(items, PANEL);
    for (int64_t c = 0; c < columns; c += PANEL) {
      gemm<W, TILE_ROWS<W>, false>(b.scaled, p.padded, 1, b.rows, p.panels + (first + c) * p.D, PANEL, p.D, PANEL,
                                   strip + c, STRIDE);
    }
    for (int64_t r = 0; r < b.rows; ++r) {
      float* row = strip + r * STRIDE;
      if (p.bias) {
        for (int64_t i = 0; i < items; ++i) row[i] += p.bias[first + i];
      }
      for (int64_t i = items; i < columns; ++i) row[i] = -INFINITE;
      Float<W> top = load<W>(tops + r * W);
      for (int64_t i = 0; i < columns; i += W) top = max<W>(load<W>(row + i), top);
      store<W>(tops + r * W, top);
      if (p.targets) {
        const int64_t label = p.targets[b.first + r] - first;
        if (label >= 0 && label < items) b.labels[r] = row[label];
      }
    }
  }
  for (int64_t r = 0; r < b.rows; ++r) b.new_peaks[r] = largest<W>(load<W>(tops + r * W));
}

// Scores to exp(score - peak), whose sums over the tile are added to sums.
template <int W>
GR_INLINE void exponentiate(const Problem& p, const Block& b, int64_t tile_first, float* sums) {
  const int64_t tile_last = std::min(p.I, tile_first + p.tile);
  float totals[LONG_BLOCK * W];
  std::memset(totals, 0, b.rows * W * sizeof(float));
  for (int64_t first = tile_first; first < tile_last; first += STRIP) {
    float* strip = strip_of(b, (first - tile_first) / STRIP);
    const int64_t columns = round_up(std::min(STRIP, tile_last - first), PANEL);
    for (int64_t r = 0; r < b.rows; ++r) {
      float* row = strip + r * STRIDE;
      const float peak = b.peaks[r] == -INFINITE ? 0.0f : b.peaks[r];  // all masked so far: zeros, not NaN
      Float<W> total{};  // of this strip: a long running sum would lose more to rounding
      for (int64_t i = 0; i < columns; i += W) {
        const Float<W> e = exp<W>(load<W>(row + i) - peak);
        total += e;
        store<W>(row + i, e);
      }
      store<W>(totals + r * W, load<W>(totals + r * W) + total);
    }
  }
  for (int64_t r = 0; r < b.rows; ++r) sums[r] += sum<W>(load<W>(totals + r * W));
}

// The exponentials of a tile, less the sum at the target, are the gradients of the scores but for the row's factor:
// applied to the queries' gradient at the end, and to the queries that the table's gradient is formed with.
template <int W>
GR_INLINE void gradients_of_tile(const Problem& p, const Block& b, int64_t tile_first) {
  const int64_t tile_last = std::min(p.I, tile_first + p.tile);
  for (int64_t r = 0; p.targets && r < b.rows; ++r) {
    const int64_t label = p.targets[b.first + r];
    if (label < tile_first || label >= tile_last) continue;
    const int64_t at = label - tile_first;
    strip_of(b, at / STRIP)[r * STRIDE + at % STRIP] -= b.sums[r];
  }
  if (!p.d_queries) return;
  for (int64_t first = tile_first; first < tile_last; first += STRIP) {
    gemm<W, TILE_ROWS<W>, true>(strip_of(b, (first - tile_first) / STRIP), STRIDE, 1, b.rows,
                                p.table + first * p.padded, p.padded, std::min(STRIP, tile_last - first), p.padded,
                                b.d_queries, p.padded);
  }
  if (tile_last < p.I) return;
  for (int64_t r = 0; r < b.rows; ++r) {
    const float factor = p.scale * b.factors[r];
    float* to = p.d_queries + (b.first + r) * p.D;
    for (int64_t d = 0; d < p.D; ++d) to[d] = factor * b.d_queries[r * p.padded + d];
  }
}

// The values of a block's queries and all that its gradients need; the gradients too when its scores were kept.
template <int W>
GR_INLINE void start_block_body(const Problem& p, const Block& b) {
  for (int64_t r = 0; r < b.rows; ++r) {
    const float* query = p.queries + (b.first + r) * p.D;
    float* scaled = b.scaled + r * p.padded;
    for (int64_t d = 0; d < p.D; ++d) scaled[d] = query[d] * p.scale;
    for (int64_t d = p.D; d < p.padded; ++d) scaled[d] = 0;
    b.peaks[r] = -INFINITE;
    b.sums[r] = b.labels[r] = 0;
  }
  for (int64_t first = 0; first < p.I; first += p.tile) {
    form_scores<W>(p, b, first);
    for (int64_t r = 0; r < b.rows; ++r) {
      if (b.new_peaks[r] > b.peaks[r]) b.sums[r] *= std::exp(b.peaks[r] - b.new_peaks[r]);
      b.peaks[r] = b.new_peaks[r];
    }
    exponentiate<W>(p, b, first, b.sums);
  }
  for (int64_t r = 0; r < b.rows; ++r) {
    const int64_t t = b.first + r;
    // No item left to choose: the loss of a target is 0 / 0; an empty sum alone is -inf, and moves nothing.
    const bool empty = b.peaks[r] == -INFINITE;
    if (empty && p.targets) b.sums[r] = std::numeric_limits<float>::quiet_NaN();
    const float base = p.targets ? b.peaks[r] - b.labels[r] : b.peaks[r];
    p.values[t] = base + std::log(b.sums[r]);
    b.factors[r] = (p.weights ? p.weights[t] : 1.0f) / (empty && !p.targets ? 1.0f : b.sums[r]);
    for (int64_t d = 0; d < p.padded; ++d) {
      b.weighted[r * p.padded + d] = b.scaled[r * p.padded + d] * b.factors[r];
      b.d_queries[r * p.padded + d] = 0;
    }
  }
  if (p.keeps_scores()) gradients_of_tile<W>(p, b, 0);
}

// Forms the scores of a tile again, now that the sums are known.
template <int W>
GR_INLINE void repeat_tile_body(const Problem& p, const Block& b, int64_t tile_first) {
  form_scores<W>(p, b, tile_first);
  exponentiate<W>(p, b, tile_first, b.new_peaks);  // these sums are of no use: over what form_scores left there
  gradients_of_tile<W>(p, b, tile_first);
}

// Adds a block to the gradients of one strip of items of a tile.
template <int W>
GR_INLINE void add_to_strip_body(const Problem& p, const Block& b, int64_t tile_first, int64_t strip) {
  const int64_t first = tile_first + strip * STRIP, items = std::min(STRIP, p.I - first);
  const float* scores = strip_of(b, strip);
  if (p.d_table) {
    gemm<W, TILE_ROWS<W>, true>(scores, 1, STRIDE, items, b.weighted, p.padded, b.rows, p.padded,
                                p.d_table + first * p.padded, p.padded);
  }
  if (p.d_bias) {
    gemm<W, 1, true>(b.factors, 0, 1, 1, scores, STRIDE, b.rows, round_up(items, PANEL), p.d_bias + first, 0);
  }
}

GR_MULTIVERSION(start_block, (const Problem& p, const Block& b), (p, b))
GR_MULTIVERSION(repeat_tile, (const Problem& p, const Block& b, int64_t tile_first), (p, b, tile_first))
GR_MULTIVERSION(add_to_strip, (const Problem& p, const Block& b, int64_t tile_first, int64_t strip),
                (p, b, tile_first, strip))

// The sizes of blocks and tiles follow from the catalogue and from whether there are gradients to form.
void choose_sizes(Problem& p) {
  const int64_t all = round_up(p.I, STRIP);
  const bool gradients = p.d_queries || p.d_table || p.d_bias;
  const int64_t fitting = TILE_SCORES / all / MIN_BLOCK * MIN_BLOCK;
  if (!gradients) {
    p.block = MAX_BLOCK;
    p.tile = std::min(all, 4 * STRIP);
  } else if (fitting >= MIN_BLOCK) {
    p.block = std::min(MAX_BLOCK, fitting);
    p.tile = all;
  } else {
    p.block = LONG_BLOCK;
    p.tile = TILE_SCORES / LONG_BLOCK;
  }
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

// Blocks first to last, into the gradients of p. Within a parallel region this is one thread's work; else the threads
// share the blocks and then, all being ready, the strips of items, each of which adds the blocks in order.
void run_stretch(const Problem& p, int64_t first_block, int64_t last_block) {
  const bool items_pass = p.d_table || p.d_bias, gradients = items_pass || p.d_queries;
  const int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  const int64_t together = std::min(last_block - first_block, threads > 1 ? threads * BLOCKS_A_THREAD : 1);
  const int64_t floats = round_up(block_floats(p), 16);
  at::Tensor scratch = at::empty({together, floats}, at::kFloat);
  float* base = scratch.mutable_data_ptr<float>();
  for (int64_t done = first_block; done < last_block; done += together) {
    const int64_t count = std::min(together, last_block - done);
    const auto block = [&](int64_t i) { return carve(p, (done + i) * p.block, base + i * floats); };
    share_out(count, [&](int64_t i) { start_block(p, block(i)); });
    for (int64_t first = 0; gradients && first < p.I; first += p.tile) {
      if (!p.keeps_scores()) share_out(count, [&](int64_t i) { repeat_tile(p, block(i), first); });
      if (!items_pass) continue;
      share_out((std::min(p.tile, p.I - first) + STRIP - 1) / STRIP, [&](int64_t strip) {
        for (int64_t i = 0; i < count; ++i) add_to_strip(p, block(i), first, strip);
      });
    }
  }
}

// Where the table is small enough, the queries are cut into stretches, each with sums of its own for the gradients of
// the table and the bias: threads then never wait for each other. How many follows from the inputs, not the threads.
void run(Problem& p) {
  choose_sizes(p);
  const int64_t blocks = (p.T + p.block - 1) / p.block;
  const int64_t table_floats = p.d_table ? p.I * p.padded : 0, bias_floats = p.d_bias ? round_up(p.I, PANEL) : 0;
  const int64_t sums = table_floats + bias_floats, bytes = sums * int64_t(sizeof(float));
  const int64_t fitting = STRETCH_BYTES / std::max<int64_t>(1, bytes);
  const int64_t stretches = std::min({MAX_STRETCHES, fitting, blocks / STRETCH_BLOCKS});
  if (stretches < 2) return run_stretch(p, 0, blocks);
  at::Tensor partial = at::zeros({sums ? stretches - 1 : 0, sums}, at::kFloat);  // the first stretch adds to p's own
  float* partials = partial.mutable_data_ptr<float>();
  share_out(stretches, [&](int64_t i) {
    Problem own = p;
    if (i > 0 && p.d_table) own.d_table = partials + (i - 1) * sums;
    if (i > 0 && p.d_bias) own.d_bias = partials + (i - 1) * sums + table_floats;
    run_stretch(own, blocks * i / stretches, blocks * (i + 1) / stretches);
  });
  const auto add_up = [&](float* total, int64_t from, int64_t count) {
    at::parallel_for(0, count, 1 << 14, [&](int64_t begin, int64_t end) {
      for (int64_t i = 0; i + 1 < stretches; ++i) {
        const float* part = partials + i * sums + from;
        for (int64_t at = begin; at < end; ++at) total[at] += part[at];
      }
    });
  };
  add_up(p.d_table, 0, table_floats);
  add_up(p.d_bias, table_floats, bias_floats);
}

at::Tensor transposed_panels(const at::Tensor& table) {
  const int64_t I = table.size(0), D = table.size(1), count = (I + PANEL - 1) / PANEL;
  at::Tensor panels = at::empty({count, D, PANEL}, table.options());
  const float* from = table.const_data_ptr<float>();
  float* to = panels.mutable_data_ptr<float>();
  at::parallel_for(0, count, 8, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t items = std::min(PANEL, I - panel * PANEL);
      const float* rows = from + panel * PANEL * D;
      float* columns = to + panel * D * PANEL;
      for (int64_t d = 0; d < D; ++d) {
        for (int64_t i = 0; i < items; ++i) columns[d * PANEL + i] = rows[i * D + d];
        for (int64_t i = items; i < PANEL; ++i) columns[d * PANEL + i] = 0;
      }
    }
  });
  return panels;
}

using Outputs = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

Outputs outputs(const at::Tensor& queries, const at::Tensor& table, const std::optional<at::Tensor>&,
                const std::optional<at::Tensor>&, const std::optional<at::Tensor>&, double, bool want_queries,
                bool want_table, bool want_bias) {
  const c10::SymInt none(0), T = queries.sym_size(0), I = table.sym_size(0), D = queries.sym_size(1);
  return {at::empty_symint({T}, queries.options()),
          at::empty_symint({want_queries ? T : none, D}, queries.options()),
          at::empty_symint({want_table ? I : none, D}, queries.options()),
          at::empty_symint({want_bias ? I : none}, queries.options())};
}

void check(const at::Tensor& queries, const at::Tensor& table, const std::optional<at::Tensor>& bias,
           const std::optional<at::Tensor>& targets, const std::optional<at::Tensor>& weights) {
  TORCH_CHECK_VALUE(queries.dim() == 2 && table.dim() == 2 && queries.size(1) == table.size(1) && table.size(0) > 0,
                    "full_softmax takes queries (T, D) and a table (I, D) with I > 0");
  const int64_t T = queries.size(0), I = table.size(0);
  const auto fits = [](const std::optional<at::Tensor>& x, int64_t count) {
    return !x || (x->dim() == 1 && x->size(0) == count);
  };
  TORCH_CHECK_VALUE(fits(bias, I) && fits(targets, T) && fits(weights, T),
                    "full_softmax takes a bias (I,), targets (T,) and weights (T,)");
  for (const at::Tensor* x : {&queries, &table, bias ? &*bias : nullptr, weights ? &*weights : nullptr}) {
    TORCH_CHECK_TYPE(!x || x->scalar_type() == at::kFloat, "full_softmax takes float32 tensors");
    TORCH_CHECK_VALUE(!x || x->is_contiguous(), "full_softmax takes contiguous tensors");
  }
  if (!targets) return;
  TORCH_CHECK_TYPE(targets->scalar_type() == at::kLong, "full_softmax takes int64 targets");
  TORCH_CHECK_VALUE(targets->is_contiguous(), "full_softmax takes contiguous tensors");
  const int64_t* target = targets->const_data_ptr<int64_t>();
  for (int64_t t = 0; t < T; ++t) {
    TORCH_CHECK_INDEX(target[t] >= 0 && target[t] < I, "target row ", target[t], " (query ", t,
                      ") is outside the table of ", I, " rows: rows must lie in [0, ", I, ")");
  }
}

// values[t] = log sum_i exp z_ti (- z_t,target), z = scale q . e + bias; the gradients are those of sum_t weight_t
// values[t]. What isn't wanted has no rows.
Outputs full_softmax(const at::Tensor& queries, const at::Tensor& table, const std::optional<at::Tensor>& bias,
                     const std::optional<at::Tensor>& targets, const std::optional<at::Tensor>& weights, double scale,
                     bool want_queries, bool want_table, bool want_bias) {
  check(queries, table, bias, targets, weights);
  auto [values, d_queries, d_table, d_bias] =
      outputs(queries, table, bias, targets, weights, scale, want_queries, want_table, want_bias);
  Problem p;
  p.T = queries.size(0);
  p.I = table.size(0);
  p.D = queries.size(1);
  p.padded = round_up(p.D, 16);
  if (p.T == 0) return {values, d_queries, d_table.zero_(), d_bias.zero_()};
  // The products with the table's rows work on whole vectors of columns: copies with zeros behind where D has none.
  const bool pad = p.padded != p.D;
  const at::Tensor panels = transposed_panels(table);
  const at::Tensor rows = pad && want_queries ? at::constant_pad_nd(table, {0, p.padded - p.D}) : table;
  at::Tensor table_sums = want_table && pad ? at::zeros({p.I, p.padded}, table.options()) : d_table.zero_();
  at::Tensor bias_sums = at::zeros({want_bias ? round_up(p.I, PANEL) : 0}, table.options());
  p.queries = queries.const_data_ptr<float>();
  p.panels = panels.const_data_ptr<float>();
  p.table = rows.const_data_ptr<float>();
  p.bias = bias ? bias->const_data_ptr<float>() : nullptr;
  p.targets = targets ? targets->const_data_ptr<int64_t>() : nullptr;
  p.weights = weights ? weights->const_data_ptr<float>() : nullptr;
  p.scale = static_cast<float>(scale);
  p.values = values.mutable_data_ptr<float>();
  if (want_queries) p.d_queries = d_queries.mutable_data_ptr<float>();
  if (want_table) p.d_table = table_sums.mutable_data_ptr<float>();
  if (want_bias) p.d_bias = bias_sums.mutable_data_ptr<float>();
  run(p);
  if (want_table && pad) d_table.copy_(table_sums.narrow(1, 0, p.D));
  if (want_bias) d_bias.copy_(bias_sums.narrow(0, 0, p.I));
  return {values, d_queries, d_table, d_bias};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(gr_kernels, library) {
  library.def(
      "full_softmax(Tensor queries, Tensor table, Tensor? bias, Tensor? targets, Tensor? weights, float scale, "
      "bool want_queries, bool want_table, bool want_bias) "
      "-> (Tensor values, Tensor d_queries, Tensor d_table, Tensor d_bias)");
}

TORCH_LIBRARY_IMPL(gr_kernels, CPU, library) { library.impl("full_softmax", &full_softmax); }

TORCH_LIBRARY_IMPL(gr_kernels, Meta, library) { library.impl("full_softmax", &outputs); }

}  // namespace gr
