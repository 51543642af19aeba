// Runs on the CPU what the jagged CUDA kernels compute on the GPU for every row: kernels/csrc/cuda/jagged_rows.h.
// Prints "ok", or what was wrong.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "jagged_rows.h"

namespace {

void require(bool condition, const char* what) {
  if (condition) return;
  std::printf("wrong: %s\n", what);
  std::exit(1);
}

// Three parts, sequences of length 0 and 1, rows of no sequence at both ends: joined row by row, then split again.
void small() {
  const std::vector<std::vector<int64_t>> offsets = {{1, 3, 3, 4}, {0, 0, 2, 2}, {0, 1, 1, 3}};
  const std::vector<int64_t> rows = {5, 2, 4};
  std::vector<std::vector<int>> values(3), back(3);
  gr::JaggedParts parts{}, outputs{};
  parts.count = outputs.count = 3;
  for (int p = 0; p < 3; ++p) {
    for (int64_t row = 0; row < rows[p]; ++row) values[p].push_back(100 * (p + 1) + int(row));
    back[p].assign(rows[p], -1);
    parts.data[p] = values[p].data();
    outputs.data[p] = back[p].data();
    parts.offsets[p] = outputs.offsets[p] = offsets[p].data();
    parts.rows[p] = outputs.rows[p] = rows[p];
  }
  std::vector<int> joined(11, -1);
  const gr::Concat concat{parts, reinterpret_cast<char*>(joined.data()), 3, sizeof(int)};
  for (int64_t row = 0; row < 11; ++row) {
    const gr::RowCopy copy = concat.locate(row);
    copy.from ? std::memcpy(copy.to, copy.from, sizeof(int)) : std::memset(copy.to, 0, sizeof(int));
  }
  const std::vector<int> expected = {0, 101, 102, 300, 200, 201, 103, 301, 302, 0, 0};
  require(joined == expected, "a concatenation");
  const gr::Split split{outputs, reinterpret_cast<const char*>(joined.data()), 3, sizeof(int)};
  for (int64_t row = 0; row < 11; ++row) {
    const gr::RowCopy copy = split.locate(row);
    copy.from ? std::memcpy(copy.to, copy.from, sizeof(int)) : std::memset(copy.to, 0, sizeof(int));
  }
  require(back[0] == std::vector<int>({0, 101, 102, 103, 0}), "part 0 of a split");
  require(back[1] == std::vector<int>({200, 201}), "part 1 of a split");
  require(back[2] == std::vector<int>({300, 301, 302, 0}), "part 2 of a split");
}

// Rows past 2^33 of 4 KiB: addresses that 32 bits, or 32-bit rows, can't hold. Nothing is read or written there.
void large() {
  constexpr int64_t kRow = 4096, kLong = int64_t{1} << 33;
  const std::vector<int64_t> first = {0, kLong, kLong + 5}, second = {0, 3, kLong};
  gr::JaggedParts parts{};
  parts.count = 2;
  parts.offsets[0] = first.data();
  parts.offsets[1] = second.data();
  parts.rows[0] = first.back();
  parts.rows[1] = second.back();
  char* const base = reinterpret_cast<char*>(uintptr_t{1} << 20);
  parts.data[0] = base;
  parts.data[1] = base + (int64_t{1} << 50);
  const auto part1 = static_cast<char*>(parts.data[1]);
  const gr::Concat concat{parts, base, 2, kRow};
  require(concat.locate(kLong - 1).from == base + (kLong - 1) * kRow, "the last row of a long sequence");
  require(concat.locate(kLong + 2).from == part1 + 2 * kRow, "a row after it");
  require(concat.locate(kLong + 3).from == base + kLong * kRow, "the next sequence");
  require(concat.locate(2 * kLong + 4).from == part1 + (kLong - 1) * kRow, "the last row");
  require(concat.locate(2 * kLong + 4).to == base + (2 * kLong + 4) * kRow, "where the last row goes");
  require(concat.locate(2 * kLong + 5).from == nullptr, "a row of no sequence");
  const gr::Split split{parts, base, 2, kRow};
  require(split.locate(kLong + 5 + kLong - 1).to == part1 + (kLong - 1) * kRow, "where a split's last row goes");
  require(split.locate(kLong + 5 + kLong - 1).from == base + (2 * kLong + 4) * kRow, "a split's last row");
}

}  // namespace

int main() {
  small();
  large();
  std::puts("ok");
}
