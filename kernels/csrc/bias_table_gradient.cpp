// The gradient of a table whose entries are added to scores: kernels/gr_kernels/bias_table_gradient.
//
// gradient[c] = sum of values[m] over the m with buckets[m] == c; a negative bucket belongs to a score that the mask
// forbids and counts nowhere. M values, C entries of the table.
//
// The values are cut into pieces whose number depends on M and C alone; a piece is summed by one thread, in float64,
// and the pieces are added in their order: the same bits for any number of threads.
//
// The schema is here; the CUDA implementation is in cuda/bias_table_gradient_bindings.cpp.
#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <utility>
#include <vector>

namespace {

constexpr int64_t kPieceValues = 1 << 16;
constexpr int64_t kMostPieces = 64;
constexpr int64_t kMostSums = 1 << 22;   // of all pieces together
constexpr int64_t kCachedEntries = 2048;  // up to here four sums an entry stay in the first-level cache

// Sums values[begin, end) into C + 1 sums, the last of which takes the negative buckets. Returns the first position
// whose bucket lies past the table, or -1. With ROWS > 1 neighbours are added to different rows of sums: runs of one
// bucket, which times and positions have, would wait for the previous addition otherwise.
template <int ROWS, class Bucket>
int64_t sum_piece(const float* values, const Bucket* buckets, int64_t begin, int64_t end, int64_t entries,
                  double* sums) {
  const int64_t row = entries + 1;
  std::vector<double> extra(ROWS > 1 ? (ROWS - 1) * row : 0, 0.0);
  const auto add = [&](double* to, int64_t m) {
    const int64_t bucket = buckets[m];
    to[bucket < 0 ? entries : bucket] += double(values[m]);
  };
  constexpr int64_t kBlock = 1024;
  for (int64_t block = begin; block < end; block += kBlock) {
    const int64_t stop = std::min(end, block + kBlock);
    bool past = false;
    for (int64_t m = block; m < stop; ++m) past |= int64_t(buckets[m]) >= entries;
    if (past) {
      return std::find_if(buckets + block, buckets + stop, [&](Bucket b) { return int64_t(b) >= entries; }) - buckets;
    }
    int64_t m = block;
    for (; m + ROWS <= stop; m += ROWS) {
      add(sums, m);
      for (int r = 1; r < ROWS; ++r) add(extra.data() + (r - 1) * row, m + r);
    }
    for (; m < stop; ++m) add(sums, m);
  }
  for (int r = 1; r < ROWS; ++r) {
    for (int64_t c = 0; c < entries; ++c) sums[c] += extra[(r - 1) * row + c];
  }
  return -1;
}

template <class Bucket>
void sum_by_bucket(const at::Tensor& values, const at::Tensor& buckets, int64_t entries, at::Tensor& out) {
  const int64_t count = values.numel(), row = entries + 1;
  const int64_t pieces = std::clamp<int64_t>(count / kPieceValues, 1, std::min(kMostPieces, std::max<int64_t>(1, kMostSums / row)));
  std::vector<double> sums(pieces * row, 0.0);
  const float* value = values.const_data_ptr<float>();
  const Bucket* bucket = buckets.const_data_ptr<Bucket>();
  std::atomic<int64_t> wrong{-1};
  at::parallel_for(0, pieces, 1, [&](int64_t first, int64_t last) {
    for (int64_t piece = first; piece < last; ++piece) {
      const int64_t begin = count * piece / pieces, end = count * (piece + 1) / pieces;
      double* mine = sums.data() + piece * row;
      const int64_t bad = entries <= kCachedEntries ? sum_piece<4>(value, bucket, begin, end, entries, mine)
                                                    : sum_piece<1>(value, bucket, begin, end, entries, mine);
      if (bad >= 0) wrong = bad;
    }
  });
  const int64_t bad = wrong;
  TORCH_CHECK_INDEX(bad < 0, "bias_table_gradient: bucket ", int64_t(bucket[std::max<int64_t>(bad, 0)]), " of value ", bad,
                    " is outside the table of ", entries, " entries");
  float* gradient = out.mutable_data_ptr<float>();
  at::parallel_for(0, entries, 4096, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) {
      double total = 0.0;
      for (int64_t piece = 0; piece < pieces; ++piece) total += sums[piece * row + c];
      gradient[c] = float(total);
    }
  });
}

at::Tensor bias_table_gradient_meta(const at::Tensor& values, const at::Tensor&, c10::SymInt entries, bool) {
  return at::empty_symint({std::move(entries)}, values.options().dtype(at::kFloat));
}

at::Tensor bias_table_gradient(const at::Tensor& values, const at::Tensor& buckets, int64_t entries, bool) {
  TORCH_CHECK_VALUE(values.scalar_type() == at::kFloat && values.is_contiguous() && buckets.is_contiguous() &&
                        values.numel() == buckets.numel() && entries >= 0,
                    "bias_table_gradient: values must be contiguous float32 with one bucket each");
  at::Tensor out = at::empty({entries}, values.options());
  if (buckets.scalar_type() == at::kInt) {
    sum_by_bucket<int32_t>(values, buckets, entries, out);
  } else {
    TORCH_CHECK_VALUE(buckets.scalar_type() == at::kLong, "bias_table_gradient: buckets must be int32 or int64");
    sum_by_bucket<int64_t>(values, buckets, entries, out);
  }
  return out;
}

TORCH_LIBRARY_FRAGMENT(gr_kernels, library) {
  library.def("bias_table_gradient(Tensor values, Tensor buckets, SymInt entries, bool deterministic) -> Tensor");
}

TORCH_LIBRARY_IMPL(gr_kernels, CPU, library) { library.impl("bias_table_gradient", &bias_table_gradient); }

TORCH_LIBRARY_IMPL(gr_kernels, Meta, library) { library.impl("bias_table_gradient", &bias_table_gradient_meta); }

}  // namespace
