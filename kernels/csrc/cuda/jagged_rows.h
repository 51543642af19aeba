// Where each row of a concatenation or a split comes from: arithmetic on 64-bit numbers that the kernels of jagged.cu do
// on the GPU, and that a compiler without CUDA compiles for the CPU, where it can be tested.
#pragma once

#include <cstdint>

#include "jagged.h"

#ifdef __CUDACC__
#define GR_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define GR_HOST_DEVICE inline
#endif

namespace gr {

// Where a row is read (null: it is zero) and written.
struct RowCopy {
  const char* from;
  char* to;
};

// First row of sequence b in the joined tensor.
GR_HOST_DEVICE int64_t joined_edge(const JaggedParts& parts, int64_t b) {
  int64_t edge = 0;
  for (int p = 0; p < parts.count; ++p) edge += parts.offsets[p][b];
  return edge;
}

// Number of edges 0 .. sequences at or before `row`, less one: the sequence of a row between the first and last edge.
template <class Edge>
GR_HOST_DEVICE int64_t sequence_of(int64_t row, int64_t sequences, Edge edge) {
  int64_t low = 0, high = sequences + 1;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (edge(middle) <= row) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low - 1;
}

struct Concat {
  JaggedParts parts;
  char* joined;
  int64_t sequences, row_bytes;

  GR_HOST_DEVICE RowCopy locate(int64_t row) const {
    RowCopy copy{nullptr, joined + row * row_bytes};
    const int64_t b = sequence_of(row, sequences, [&](int64_t e) { return joined_edge(parts, e); });
    if (b < 0 || b >= sequences) return copy;
    int64_t place = row - joined_edge(parts, b);
    for (int p = 0; p < parts.count; ++p) {
      const int64_t begin = parts.offsets[p][b], length = parts.offsets[p][b + 1] - begin;
      if (place < length) {
        copy.from = static_cast<const char*>(parts.data[p]) + (begin + place) * row_bytes;
        return copy;
      }
      place -= length;
    }
    return copy;
  }
};

struct Split {
  JaggedParts parts;
  const char* joined;
  int64_t sequences, row_bytes;

  // `row` counts through the rows of all parts.
  GR_HOST_DEVICE RowCopy locate(int64_t row) const {
    int part = 0;
    while (part + 1 < parts.count && row >= parts.rows[part]) row -= parts.rows[part++];
    RowCopy copy{nullptr, static_cast<char*>(parts.data[part]) + row * row_bytes};
    const int64_t* offsets = parts.offsets[part];
    const int64_t b = sequence_of(row, sequences, [&](int64_t e) { return offsets[e]; });
    if (b < 0 || b >= sequences) return copy;
    int64_t source = joined_edge(parts, b) + row - offsets[b];
    for (int p = 0; p < part; ++p) source += parts.offsets[p][b + 1] - parts.offsets[p][b];
    copy.from = joined + source * row_bytes;
    return copy;
  }
};

}  // namespace gr
