// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): four random 32-bit words
// as a pure function of a 64-bit key and a 128-bit counter.
#pragma once

#include <cstdint>

#include "simd.h"

namespace gr {

GR_INLINE void philox4x32_10(uint32_t key0, uint32_t key1, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3,
                             uint32_t& w0, uint32_t& w1, uint32_t& w2, uint32_t& w3) {
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const uint64_t left = uint64_t{0xD2511F53u} * c0;
    const uint64_t right = uint64_t{0xCD9E8D57u} * c2;
    const uint32_t n0 = uint32_t(right >> 32) ^ c1 ^ key0;
    const uint32_t n2 = uint32_t(left >> 32) ^ c3 ^ key1;
    c0 = n0;
    c1 = uint32_t(right);
    c2 = n2;
    c3 = uint32_t(left);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  w0 = c0;
  w1 = c1;
  w2 = c2;
  w3 = c3;
}

}  // namespace gr
