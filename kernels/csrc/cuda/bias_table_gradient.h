// Launcher of the table gradient's CUDA kernels: raw pointers and a stream, nothing of torch.
// kernels/csrc/bias_table_gradient.cpp says what they compute.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace gr {

// Rows of partial sums that a call needs: `partials` below has this many rows of `entries` floats. A function of the
// arguments alone, never of the GPU, as are the results of the deterministic variant.
int64_t bias_table_gradient_partials(int64_t count, int64_t entries);

// buckets are int32 or, with `wide`, int64; gradient has `entries` floats.
cudaError_t launch_bias_table_gradient(const float* values, const void* buckets, bool wide, int64_t count,
                                       int64_t entries, bool deterministic, float* partials, float* gradient,
                                       cudaStream_t stream);

}  // namespace gr
