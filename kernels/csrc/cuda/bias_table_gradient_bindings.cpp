// bias_table_gradient on CUDA tensors, on the current stream. The schema is in ../bias_table_gradient.cpp.
#include <ATen/Functions.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "bias_table_gradient.h"

namespace {

at::Tensor bias_table_gradient(const at::Tensor& values, const at::Tensor& buckets, int64_t entries,
                               bool deterministic) {
  const bool wide = buckets.scalar_type() == at::kLong;
  TORCH_CHECK_VALUE(values.scalar_type() == at::kFloat && values.is_contiguous() && buckets.is_contiguous() &&
                        buckets.device() == values.device() && values.numel() == buckets.numel() && entries >= 0 &&
                        (wide || buckets.scalar_type() == at::kInt),
                    "bias_table_gradient: values must be contiguous float32 with one int32 or int64 bucket each");
  const c10::cuda::CUDAGuard guard(values.device());
  const int64_t count = values.numel();
  at::Tensor gradient = at::empty({entries}, values.options());
  at::Tensor partials = at::empty({gr::bias_table_gradient_partials(count, entries), entries}, values.options());
  C10_CUDA_CHECK(gr::launch_bias_table_gradient(
      values.const_data_ptr<float>(), buckets.const_data_ptr(), wide, count, entries, deterministic,
      partials.mutable_data_ptr<float>(), gradient.mutable_data_ptr<float>(), c10::cuda::getCurrentCUDAStream()));
  return gradient;
}

TORCH_LIBRARY_IMPL(gr_kernels, CUDA, library) { library.impl("bias_table_gradient", &bias_table_gradient); }

}  // namespace
