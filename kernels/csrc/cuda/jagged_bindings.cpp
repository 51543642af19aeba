// jagged_concat and jagged_split on CUDA tensors: checks what can be checked without waiting for the device, allocates,
// and launches on the current stream. The schemas are in ../jagged.cpp.
#include <ATen/Functions.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <vector>

#include "jagged.h"

namespace {

gr::JaggedParts describe(const std::vector<at::Tensor>& parts, at::TensorList offsets) {
  TORCH_CHECK_VALUE(!parts.empty() && parts.size() == offsets.size(), "every part needs its offsets");
  TORCH_CHECK_VALUE(parts.size() <= gr::JaggedParts::kMost, "at most ", gr::JaggedParts::kMost,
                    " parts can be joined at once, not ", parts.size());
  gr::JaggedParts described{};
  described.count = static_cast<int>(parts.size());
  for (size_t p = 0; p < parts.size(); ++p) {
    const at::Tensor& edges = offsets[p];
    TORCH_CHECK_VALUE(parts[p].device() == parts[0].device() && edges.device() == parts[0].device(), "part ", p,
                      " and its offsets must be on ", parts[0].device());
    TORCH_CHECK_VALUE(edges.dim() == 1 && edges.scalar_type() == at::kLong && edges.is_contiguous() &&
                          edges.size(0) == offsets[0].size(0),
                      "the offsets of part ", p, " must be contiguous int64, one more than there are sequences");
    TORCH_CHECK_VALUE(parts[p].scalar_type() == parts[0].scalar_type() && parts[p].dim() == parts[0].dim() &&
                          parts[p].sizes().slice(1) == parts[0].sizes().slice(1),
                      "part ", p, " has rows of another shape or type than part 0");
    described.data[p] = const_cast<void*>(parts[p].const_data_ptr());
    described.offsets[p] = edges.const_data_ptr<int64_t>();
    described.rows[p] = parts[p].size(0);
  }
  return described;
}

int64_t bytes_of_a_row(const at::Tensor& x) {
  return x.size(0) == 0 ? 0 : static_cast<int64_t>(x.nbytes()) / x.size(0);
}

at::Tensor jagged_concat(at::TensorList parts, at::TensorList offsets) {
  std::vector<at::Tensor> contiguous;
  int64_t rows = 0;
  for (const at::Tensor& part : parts) {
    contiguous.push_back(part.contiguous());
    rows += part.size(0);
  }
  const gr::JaggedParts described = describe(contiguous, offsets);
  const c10::cuda::CUDAGuard guard(contiguous[0].device());
  std::vector<int64_t> sizes(contiguous[0].sizes().vec());
  sizes[0] = rows;
  at::Tensor out = at::empty(sizes, contiguous[0].options());
  C10_CUDA_CHECK(gr::launch_jagged_concat(described, out.mutable_data_ptr(), offsets[0].size(0) - 1,
                                          bytes_of_a_row(out), c10::cuda::getCurrentCUDAStream()));
  return out;
}

std::vector<at::Tensor> jagged_split(const at::Tensor& joined, at::TensorList offsets, at::IntArrayRef rows) {
  const at::Tensor source = joined.contiguous();
  const c10::cuda::CUDAGuard guard(source.device());
  std::vector<at::Tensor> parts;
  int64_t count = 0;
  for (const int64_t part_rows : rows) {
    std::vector<int64_t> sizes(source.sizes().vec());
    sizes[0] = part_rows;
    parts.push_back(at::empty(sizes, source.options()));
    count += part_rows;
  }
  TORCH_CHECK_VALUE(count == source.size(0), "the parts have ", count, " rows, the joined tensor ", source.size(0));
  const gr::JaggedParts described = describe(parts, offsets);
  C10_CUDA_CHECK(gr::launch_jagged_split(source.const_data_ptr(), described, offsets[0].size(0) - 1,
                                         bytes_of_a_row(source), c10::cuda::getCurrentCUDAStream()));
  return parts;
}

TORCH_LIBRARY_IMPL(gr_kernels, CUDA, library) {
  library.impl("jagged_concat", &jagged_concat);
  library.impl("jagged_split", &jagged_split);
}

}  // namespace
