// Time differences to buckets: bucket(|dt|) = #{b : |dt| >= thresholds[b]}, exactly, without a logarithm per score.
// What |dt| is, of any two times, stands in gr_kernels/hstu_attention/buckets.py.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "simd.h"

namespace gr {

constexpr int64_t kNever = std::numeric_limits<int64_t>::max();  // a threshold that no difference reaches
constexpr int64_t kLongest = kNever - 1;                         // the longest difference

// A table over the leading bits of float(|dt|) gives a bucket that is right or a little too low; comparing with that
// bucket's upper threshold `steps` times corrects it. The table is as fine as it takes to need one step (it always
// does for the logarithmic buckets), up to 7 bits of mantissa.
struct TimeBucketTable {
  // Threshold that ends bucket b, for 32-bit and 64-bit differences; sentinels past the last bucket.
  std::vector<int32_t> end32;
  std::vector<int64_t> end64;
  std::vector<int32_t> start;  // by cell: 0 for |dt| = 0, then one per leading-bits value from 1.0f up
  int32_t shift = 0;
  int32_t first_cell = 0;  // leading bits of 1.0f, less one
  int32_t steps = 0;

  TimeBucketTable() = default;

  TimeBucketTable(const int64_t* thresholds, int64_t count) {
    for (int mantissa_bits = 2; mantissa_bits <= 7; ++mantissa_bits) {
      build(thresholds, count, mantissa_bits);
      if (steps <= 1) break;
    }
    constexpr int32_t never32 = std::numeric_limits<int32_t>::max();
    end64.assign(thresholds, thresholds + count);
    end64.insert(end64.end(), steps + 1, kNever);
    end32.resize(end64.size());
    std::transform(end64.begin(), end64.end(), end32.begin(),
                   [](int64_t t) { return static_cast<int32_t>(std::min<int64_t>(t, never32)); });
  }

 private:
  static uint32_t bits(float x) {
    uint32_t b;
    std::memcpy(&b, &x, sizeof(b));
    return b;
  }
  static float value(uint32_t b) {
    float x;
    std::memcpy(&x, &b, sizeof(x));
    return x;
  }

  // Halfway between a float x >= 1 and the float below it: the integers that round to x or more start here.
  static double reaching(float x) { return (static_cast<double>(value(bits(x) - 1)) + x) / 2; }

  void build(const int64_t* thresholds, int64_t count, int mantissa_bits) {
    shift = 23 - mantissa_bits;
    const uint32_t lowest = bits(1.0f) >> shift;
    const uint32_t highest = bits(9.3e18f) >> shift;  // 2^63 and a little
    first_cell = static_cast<int32_t>(lowest) - 1;
    const auto bucket = [&](int64_t dt) {
      return static_cast<int32_t>(std::upper_bound(thresholds, thresholds + count, dt) - thresholds);
    };
    start.assign(1, 0);
    steps = 0;
    for (uint32_t cell = lowest; cell <= highest; ++cell) {
      constexpr double limit = 9.2233720368547748e18;  // the largest double below 2^63
      const double from = std::ceil(reaching(value(cell << shift))), to = std::floor(reaching(value((cell + 1) << shift)));
      const int64_t smallest = static_cast<int64_t>(std::min(from, limit));
      const int64_t largest = to >= limit ? kLongest : static_cast<int64_t>(to);
      start.push_back(bucket(smallest));
      steps = std::max(steps, bucket(largest) - start.back());
    }
  }
};

// |a - b|. With SATURATE of any two times, at most kLongest; else the difference must be a number of the type.
template <typename Time, bool SATURATE>
GR_INLINE Time time_distance(Time a, Time b) {
  if constexpr (SATURATE) {
    const uint64_t x = static_cast<uint64_t>(a), y = static_cast<uint64_t>(b);
    return static_cast<Time>(std::min(a < b ? y - x : x - y, static_cast<uint64_t>(kLongest)));
  } else {
    const Time difference = a - b;
    return difference < 0 ? -difference : difference;
  }
}

// buckets[j] of |query_time - key_times[j]| for `count` keys. Time is int32_t (rebased, differences below 2^31 - 1) or
// int64_t, with SATURATE where differences can exceed kLongest. No difference reaches the sentinels of `end`, so no
// bucket is past the last.
template <typename Time, bool SATURATE>
GR_INLINE void time_buckets(Time query_time, const Time* key_times, int64_t count, const int32_t* start,
                            const Time* end, int32_t shift, int32_t first_cell, int32_t steps,
                            int32_t* GR_RESTRICT buckets) {
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) {
    const Time dt = time_distance<Time, SATURATE>(query_time, key_times[j]);
    const float as_float = static_cast<float>(dt);
    int32_t leading;
    std::memcpy(&leading, &as_float, sizeof(leading));
    const int32_t cell = (leading >> shift) - first_cell;
    int32_t bucket = start[cell < 0 ? 0 : cell];
    bucket += dt >= end[bucket];
    buckets[j] = bucket;
  }
  for (int32_t step = 1; step < steps; ++step) {
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) {
      const Time dt = time_distance<Time, SATURATE>(query_time, key_times[j]);
      buckets[j] += dt >= end[buckets[j]];
    }
  }
}

}  // namespace gr
