// Launchers of the jagged CUDA kernels: raw pointers and a stream, nothing of torch. kernels/csrc/jagged.cpp says what
// they compute.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace gr {

// P parts of the same B sequences; `data` is read by a concatenation and written by a split.
struct JaggedParts {
  static constexpr int kMost = 8;
  void* data[kMost];
  const int64_t* offsets[kMost];  // B + 1 each, on the device
  int64_t rows[kMost];
  int count;
};

// Widest word, in bytes (16, 8, 4, 2 or 1), that divides a row and aligns with every pointer.
int jagged_word_bytes(const JaggedParts& parts, const void* joined, int64_t row_bytes);

cudaError_t launch_jagged_concat(const JaggedParts& parts, void* joined, int64_t sequences, int64_t row_bytes,
                                 cudaStream_t stream);

cudaError_t launch_jagged_split(const void* joined, const JaggedParts& parts, int64_t sequences, int64_t row_bytes,
                                cudaStream_t stream);

}  // namespace gr
