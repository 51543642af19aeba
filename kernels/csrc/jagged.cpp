// Jagged tensors put together sequence by sequence, and taken apart again: kernels/gr_kernels/jagged.
//
// P parts, B sequences. Part p has sequence b in its rows offsets[p][b] to offsets[p][b + 1]. In the joined tensor
// the parts of sequence b follow one another, from row joined[b] = sum over p of offsets[p][b] on: the offsets of the
// joined tensor are the sum of those of the parts. Rows that belong to no sequence are written as zeros.
//
// The schemas are here; the CUDA implementations are in cuda/jagged_bindings.cpp.
#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int64_t kBytesPerTask = 64 << 10;

// One part, or one output of a split: its rows and where its sequences lie.
struct Part {
  char* data;
  const int64_t* offsets;  // B + 1
};

void check_offsets(const at::Tensor& offsets, int64_t sequences, int64_t rows, size_t part) {
  TORCH_CHECK_VALUE(offsets.dim() == 1 && offsets.scalar_type() == at::kLong && offsets.is_contiguous() &&
                        offsets.device().is_cpu(),
                    "the offsets of part ", part, " must be contiguous int64 on CPU");
  TORCH_CHECK_VALUE(offsets.size(0) == sequences + 1, "part ", part, " has ", offsets.size(0) - 1,
                    " sequences, part 0 has ", sequences);
  const int64_t* edge = offsets.const_data_ptr<int64_t>();
  TORCH_CHECK_VALUE(edge[0] >= 0 && edge[sequences] <= rows && std::is_sorted(edge, edge + sequences + 1),
                    "the offsets of part ", part, " must ascend within its ", rows, " rows");
}

std::vector<int64_t> joined_offsets(const std::vector<Part>& parts, int64_t sequences) {
  std::vector<int64_t> joined(sequences + 1, 0);
  for (const Part& part : parts) {
    for (int64_t b = 0; b <= sequences; ++b) joined[b] += part.offsets[b];
  }
  return joined;
}

// Copies the rows of every sequence, from the parts into the joined tensor or back. Tasks are stretches of the joined
// rows, so that threads share the work evenly whatever the lengths.
template <bool INTO_JOINED>
void move_rows(const std::vector<Part>& parts, const std::vector<int64_t>& joined, char* data, int64_t row_bytes) {
  const int64_t first = joined.front(), count = joined.back() - first;
  const int64_t grain = std::max<int64_t>(1, kBytesPerTask / std::max<int64_t>(1, row_bytes));
  at::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    int64_t row = first + begin;
    const int64_t stop = first + end;
    int64_t b = std::upper_bound(joined.begin(), joined.end(), row) - joined.begin() - 1;
    for (; row < stop; row = std::max(row, joined[++b])) {
      int64_t place = joined[b];  // where the next part of this sequence begins
      for (const Part& part : parts) {
        const int64_t length = part.offsets[b + 1] - part.offsets[b];
        const int64_t from = std::max(row, place), to = std::min(stop, place + length);
        if (from < to) {
          char* at_part = part.data + (part.offsets[b] + from - place) * row_bytes;
          char* at_joined = data + from * row_bytes;
          const size_t bytes = size_t((to - from) * row_bytes);
          INTO_JOINED ? std::memcpy(at_joined, at_part, bytes) : std::memcpy(at_part, at_joined, bytes);
        }
        place += length;
      }
    }
  });
}

// Zeros in the rows before the first sequence and after the last.
void clear_outside(char* data, int64_t begin, int64_t end, int64_t rows, int64_t row_bytes) {
  std::memset(data, 0, size_t(begin * row_bytes));
  std::memset(data + end * row_bytes, 0, size_t((rows - end) * row_bytes));
}

at::Tensor jagged_concat_meta(at::TensorList parts, at::TensorList) {
  c10::SymDimVector sizes(parts[0].sym_sizes());
  sizes[0] = 0;
  for (const at::Tensor& part : parts) sizes[0] += part.sym_size(0);
  return at::empty_symint(sizes, parts[0].options());
}

at::Tensor jagged_concat(at::TensorList parts, at::TensorList offsets) {
  TORCH_CHECK_VALUE(!parts.empty() && parts.size() == offsets.size(), "every part needs its offsets");
  const int64_t sequences = offsets[0].numel() - 1;
  std::vector<at::Tensor> contiguous;
  std::vector<Part> views;
  for (size_t p = 0; p < parts.size(); ++p) {
    TORCH_CHECK_VALUE(parts[p].scalar_type() == parts[0].scalar_type() && parts[p].dim() == parts[0].dim() &&
                          parts[p].sizes().slice(1) == parts[0].sizes().slice(1),
                      "part ", p, " has rows of another shape or type than part 0");
    check_offsets(offsets[p], sequences, parts[p].size(0), p);
    contiguous.push_back(parts[p].contiguous());
    views.push_back({static_cast<char*>(const_cast<void*>(contiguous.back().const_data_ptr())),
                     offsets[p].const_data_ptr<int64_t>()});
  }
  at::Tensor out = jagged_concat_meta(parts, offsets);
  if (out.numel() == 0) return out;
  const int64_t row_bytes = int64_t(out.nbytes()) / out.size(0);
  const std::vector<int64_t> joined = joined_offsets(views, sequences);
  char* data = static_cast<char*>(out.mutable_data_ptr());
  clear_outside(data, joined.front(), joined.back(), out.size(0), row_bytes);
  move_rows<true>(views, joined, data, row_bytes);
  return out;
}

std::vector<at::Tensor> jagged_split_meta(const at::Tensor& joined, at::TensorList, c10::SymIntArrayRef rows) {
  std::vector<at::Tensor> parts;
  c10::SymDimVector sizes(joined.sym_sizes());
  for (const c10::SymInt& count : rows) {
    sizes[0] = count;
    parts.push_back(at::empty_symint(sizes, joined.options()));
  }
  return parts;
}

std::vector<at::Tensor> jagged_split(const at::Tensor& joined, at::TensorList offsets, c10::SymIntArrayRef rows) {
  TORCH_CHECK_VALUE(!rows.empty() && rows.size() == offsets.size(), "every part needs its offsets");
  const int64_t sequences = offsets[0].numel() - 1;
  std::vector<at::Tensor> parts = jagged_split_meta(joined, offsets, rows);
  std::vector<Part> views;
  int64_t count = 0;
  for (const at::Tensor& part : parts) count += part.size(0);
  TORCH_CHECK_VALUE(count == joined.size(0), "the parts have ", count, " rows, the joined tensor ", joined.size(0));
  for (size_t p = 0; p < parts.size(); ++p) {
    check_offsets(offsets[p], sequences, parts[p].size(0), p);
    views.push_back({static_cast<char*>(parts[p].mutable_data_ptr()), offsets[p].const_data_ptr<int64_t>()});
  }
  const std::vector<int64_t> edges = joined_offsets(views, sequences);
  const at::Tensor source = joined.contiguous();
  const int64_t row_bytes = source.size(0) == 0 ? 0 : int64_t(source.nbytes()) / source.size(0);
  if (row_bytes == 0) {
    for (at::Tensor& part : parts) part.zero_();
    return parts;
  }
  for (size_t p = 0; p < parts.size(); ++p) {
    clear_outside(views[p].data, views[p].offsets[0], views[p].offsets[sequences], parts[p].size(0), row_bytes);
  }
  move_rows<false>(views, edges, static_cast<char*>(const_cast<void*>(source.const_data_ptr())), row_bytes);
  return parts;
}

TORCH_LIBRARY_FRAGMENT(gr_kernels, library) {
  library.def("jagged_concat(Tensor[] parts, Tensor[] offsets) -> Tensor");
  library.def("jagged_split(Tensor joined, Tensor[] offsets, SymInt[] rows) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(gr_kernels, CPU, library) {
  library.impl("jagged_concat", &jagged_concat);
  library.impl("jagged_split", &jagged_split);
}

TORCH_LIBRARY_IMPL(gr_kernels, Meta, library) {
  library.impl("jagged_concat", &jagged_concat_meta);
  library.impl("jagged_split", &jagged_split_meta);
}

}  // namespace
