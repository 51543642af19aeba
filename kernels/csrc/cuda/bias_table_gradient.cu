// The gradient of a table added to scores, as a histogram with weights, in two stages.
//
// Stage 1: each block sums its stretch of the values by bucket in shared memory and writes one row of partial sums.
//   fast: several copies of the histogram a block, so that lanes which meet in a bucket mostly meet in different
//     copies; additions are shared-memory atomics, in any order.
//   deterministic: one histogram a warp and no atomics. Lanes that meet in a bucket are found with match_any, and
//     their values are added by the lowest of them in the order of lanes; the block's warps are added in order.
// Stage 2: a thread an entry adds the partial rows in their order.
// The cut into stretches depends on the number of values and entries alone, so the deterministic bits are the same on
// every GPU. Tables that exceed a block's shared memory are made a range of entries at a time (the grid's y).
#include "bias_table_gradient.h"

#include <algorithm>

namespace gr {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kMostCopies = 32;
constexpr int64_t kSharedFloats = 12288;  // 48 KiB: what any GPU gives without being asked, several blocks an SM
constexpr int64_t kMostPartials = 2048;
constexpr int64_t kStretch = 32768;  // values a block at least, to be worth a row of partial sums

struct Plan {
  int64_t range;     // entries of the table that a block handles, one more where that makes it odd: the copies of an
                     // entry then lie in different banks
  int64_t ranges;    // such ranges
  int copies;        // histograms a block
  int64_t partials;  // rows of partial sums = blocks along x
};

Plan plan(int64_t count, int64_t entries, bool deterministic) {
  Plan p;
  const int64_t limit = deterministic ? kSharedFloats / kWarps : kSharedFloats;
  p.range = std::min(entries, limit - 1) | 1;
  p.ranges = (entries + p.range - 1) / p.range;
  p.copies = deterministic ? kWarps : static_cast<int>(std::min<int64_t>(kMostCopies, kSharedFloats / p.range));
  p.partials = bias_table_gradient_partials(count, entries);
  return p;
}

// The block's stretch [begin, end), the same in every range of entries.
__device__ __forceinline__ void stretch(int64_t count, int64_t& begin, int64_t& end) {
  const int64_t each = (count + gridDim.x - 1) / gridDim.x;
  begin = min(count, each * blockIdx.x);
  end = min(count, begin + each);
}

__device__ __forceinline__ void clear(float* sums, int count) {
  for (int i = threadIdx.x; i < count; i += kThreads) sums[i] = 0.0f;
  __syncthreads();
}

// The block's copies added in their order, to its row of partial sums.
__device__ __forceinline__ void write_partial(const float* sums, int copies, int range, int64_t first, int64_t entries,
                                              float* partials) {
  __syncthreads();
  float* row = partials + static_cast<int64_t>(blockIdx.x) * entries + first;
  const int here = static_cast<int>(min(static_cast<int64_t>(range), entries - first));
  for (int c = threadIdx.x; c < here; c += kThreads) {
    float total = 0.0f;
    for (int copy = 0; copy < copies; ++copy) total += sums[copy * range + c];
    row[c] = total;
  }
}

template <class Bucket>
__global__ void __launch_bounds__(kThreads)
    sum_fast(const float* __restrict__ values, const Bucket* __restrict__ buckets, int64_t count, int64_t entries,
             int range, int copies, float* __restrict__ partials) {
  extern __shared__ float sums[];
  const int64_t first = static_cast<int64_t>(blockIdx.y) * range;
  const int64_t here = min(static_cast<int64_t>(range), entries - first);
  clear(sums, copies * range);
  float* mine = sums + (threadIdx.x % copies) * range;
  int64_t begin, end;
  stretch(count, begin, end);
  for (int64_t m = begin + threadIdx.x; m < end; m += kThreads) {
    const int64_t bucket = static_cast<int64_t>(buckets[m]) - first;
    if (bucket >= 0 && bucket < here) atomicAdd(mine + bucket, values[m]);
  }
  write_partial(sums, copies, range, first, entries, partials);
}

template <class Bucket>
__global__ void __launch_bounds__(kThreads)
    sum_deterministic(const float* __restrict__ values, const Bucket* __restrict__ buckets, int64_t count,
                      int64_t entries, int range, float* __restrict__ partials) {
  extern __shared__ float sums[];
  const int64_t first = static_cast<int64_t>(blockIdx.y) * range;
  const int64_t here = min(static_cast<int64_t>(range), entries - first);
  clear(sums, kWarps * range);
  const int lane = threadIdx.x % 32;
  float* mine = sums + (threadIdx.x / 32) * range;
  int64_t begin, end;
  stretch(count, begin, end);
  // whole warps go round together: the shuffles need every lane
  for (int64_t base = begin + (threadIdx.x - lane); base < end; base += kThreads) {
    const int64_t m = base + lane;
    const int64_t bucket = m < end ? static_cast<int64_t>(buckets[m]) - first : -1;
    const bool counts = bucket >= 0 && bucket < here;
    const float value = counts ? values[m] : 0.0f;
    const int slot = counts ? static_cast<int>(bucket) : -1;
    const unsigned peers = __match_any_sync(0xFFFFFFFFu, slot);
    const int lowest = __ffs(peers) - 1;
    // one value a round, of every group of peers at once: as many rounds as the largest group has lanes
    float total = 0.0f;
    unsigned left = peers;
    while (__any_sync(0xFFFFFFFFu, left != 0)) {
      const int source = left ? __ffs(left) - 1 : lane;
      const float theirs = __shfl_sync(0xFFFFFFFFu, value, source);
      if (left) total += theirs;
      left &= left - 1;
    }
    if (counts && lane == lowest) mine[slot] += total;
    __syncwarp();  // the next round's leader of this slot may be another lane
  }
  write_partial(sums, kWarps, range, first, entries, partials);
}

__global__ void __launch_bounds__(kThreads)
    add_partials(const float* __restrict__ partials, int64_t rows, int64_t entries, float* __restrict__ gradient) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (c >= entries) return;
  float total = 0.0f;
  for (int64_t row = 0; row < rows; ++row) total += partials[row * entries + c];
  gradient[c] = total;
}

template <class Bucket>
void launch_sums(const float* values, const Bucket* buckets, int64_t count, int64_t entries, bool deterministic,
                 const Plan& p, float* partials, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(p.partials), static_cast<unsigned>(p.ranges));
  const size_t shared = static_cast<size_t>(p.copies) * p.range * sizeof(float);
  const int range = static_cast<int>(p.range);
  if (deterministic) {
    sum_deterministic<<<grid, kThreads, shared, stream>>>(values, buckets, count, entries, range, partials);
  } else {
    sum_fast<<<grid, kThreads, shared, stream>>>(values, buckets, count, entries, range, p.copies, partials);
  }
}

}  // namespace

int64_t bias_table_gradient_partials(int64_t count, int64_t entries) {
  // no more rows of partial sums than a quarter of the values to be read
  const int64_t affordable = std::max<int64_t>(1, count / (4 * std::max<int64_t>(1, entries)));
  return std::clamp<int64_t>((count + kStretch - 1) / kStretch, 1, std::min(kMostPartials, affordable));
}

cudaError_t launch_bias_table_gradient(const float* values, const void* buckets, bool wide, int64_t count,
                                       int64_t entries, bool deterministic, float* partials, float* gradient,
                                       cudaStream_t stream) {
  if (entries == 0) return cudaSuccess;
  const Plan p = plan(count, entries, deterministic);
  if (wide) {
    launch_sums(values, static_cast<const int64_t*>(buckets), count, entries, deterministic, p, partials, stream);
  } else {
    launch_sums(values, static_cast<const int32_t*>(buckets), count, entries, deterministic, p, partials, stream);
  }
  const unsigned blocks = static_cast<unsigned>((entries + kThreads - 1) / kThreads);
  add_partials<<<blocks, kThreads, 0, stream>>>(partials, p.partials, entries, gradient);
  return cudaGetLastError();
}

}  // namespace gr
