// Jagged concatenation and split: every byte is read once and written once, in words of up to 16 bytes.
//
// A block takes tiles of consecutive rows of what is written. Its first threads find, one row each, where the row
// comes from (a binary search of the offsets); then all threads copy the tile. Row numbers and addresses are 64-bit; a
// grid of fixed size strides over any number of tiles.
#include <algorithm>

#include "jagged_rows.h"

namespace gr {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksPerSM = 4;  // 64 registers a thread
constexpr int kMostTileRows = kThreads;
constexpr int64_t kTileBytes = 16 << 10;
constexpr int64_t kMostBlocks = 1 << 16;

template <class Word, class Locate>
__global__ void __launch_bounds__(kThreads, kBlocksPerSM)
    copy_rows(const __grid_constant__ Locate locate, int64_t rows, int tile_rows, int64_t row_words) {
  __shared__ RowCopy copies[kMostTileRows];
  const int64_t tiles = (rows + tile_rows - 1) / tile_rows;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t first = tile * tile_rows;
    const int count = static_cast<int>(min(static_cast<int64_t>(tile_rows), rows - first));
    if (threadIdx.x < count) copies[threadIdx.x] = locate.locate(first + threadIdx.x);
    __syncthreads();
    if (tile_rows == 1) {  // rows of more than a tile's bytes
      const Word* from = reinterpret_cast<const Word*>(copies[0].from);
      Word* to = reinterpret_cast<Word*>(copies[0].to);
      for (int64_t w = threadIdx.x; w < row_words; w += kThreads) to[w] = from ? from[w] : Word{};
    } else {
      const unsigned words = static_cast<unsigned>(row_words), all = words * count;
      for (unsigned w = threadIdx.x; w < all; w += kThreads) {
        const unsigned row = w / words, word = w - row * words;
        const RowCopy copy = copies[row];
        const Word value = copy.from ? reinterpret_cast<const Word*>(copy.from)[word] : Word{};
        reinterpret_cast<Word*>(copy.to)[word] = value;
      }
    }
    __syncthreads();  // before the next tile's rows replace these
  }
}

template <class Locate>
cudaError_t launch(const Locate& locate, int64_t rows, int64_t row_bytes, int word_bytes, cudaStream_t stream) {
  if (rows == 0 || row_bytes == 0) return cudaSuccess;
  const int64_t row_words = row_bytes / word_bytes;
  const int tile_rows = static_cast<int>(std::clamp<int64_t>(kTileBytes / row_bytes, 1, kMostTileRows));
  const int64_t tiles = (rows + tile_rows - 1) / tile_rows;
  const dim3 grid(static_cast<unsigned>(std::min(tiles, kMostBlocks)));
  switch (word_bytes) {
    case 16: copy_rows<uint4><<<grid, kThreads, 0, stream>>>(locate, rows, tile_rows, row_words); break;
    case 8: copy_rows<uint2><<<grid, kThreads, 0, stream>>>(locate, rows, tile_rows, row_words); break;
    case 4: copy_rows<uint32_t><<<grid, kThreads, 0, stream>>>(locate, rows, tile_rows, row_words); break;
    case 2: copy_rows<uint16_t><<<grid, kThreads, 0, stream>>>(locate, rows, tile_rows, row_words); break;
    default: copy_rows<uint8_t><<<grid, kThreads, 0, stream>>>(locate, rows, tile_rows, row_words); break;
  }
  return cudaGetLastError();
}

}  // namespace

int jagged_word_bytes(const JaggedParts& parts, const void* joined, int64_t row_bytes) {
  uintptr_t bits = reinterpret_cast<uintptr_t>(joined) | static_cast<uintptr_t>(row_bytes);
  for (int p = 0; p < parts.count; ++p) bits |= reinterpret_cast<uintptr_t>(parts.data[p]);
  int bytes = 16;
  while (bits & static_cast<uintptr_t>(bytes - 1)) bytes /= 2;
  return bytes;
}

cudaError_t launch_jagged_concat(const JaggedParts& parts, void* joined, int64_t sequences, int64_t row_bytes,
                                 cudaStream_t stream) {
  int64_t rows = 0;
  for (int p = 0; p < parts.count; ++p) rows += parts.rows[p];
  const Concat concat{parts, static_cast<char*>(joined), sequences, row_bytes};
  return launch(concat, rows, row_bytes, jagged_word_bytes(parts, joined, row_bytes), stream);
}

cudaError_t launch_jagged_split(const void* joined, const JaggedParts& parts, int64_t sequences, int64_t row_bytes,
                                cudaStream_t stream) {
  int64_t rows = 0;
  for (int p = 0; p < parts.count; ++p) rows += parts.rows[p];
  const Split split{parts, static_cast<const char*>(joined), sequences, row_bytes};
  return launch(split, rows, row_bytes, jagged_word_bytes(parts, joined, row_bytes), stream);
}

}  // namespace gr
