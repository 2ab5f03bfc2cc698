// The CPU's kernel, as built for several instruction sets.

#pragma once

#include "../task.h"

namespace fastast::mel {

struct CpuKernel {
  const char* name;
  int lanes;
  // Writes the rows begin .. end - 1. `bin_at[k]` is position(k); `scratch` has scratch_floats()
  // and is aligned to 64 bytes.
  void (*run)(const Task& task, const std::int32_t* bin_at, float* scratch, std::int64_t begin,
              std::int64_t end);

  // Samples, spectrum and log-mel values of as many frames as there are lanes, and the samples of
  // those that reach beyond their clip.
  std::int64_t scratch_floats(const Task& task) const {
    return std::int64_t{lanes} *
           (2 * task.window_length + task.fft_size + task.num_mels + lanes);
  }
};

extern const CpuKernel kBaselineKernel;  // what the compiler targets unasked
extern const CpuKernel kAvx2Kernel;
extern const CpuKernel kAvx512Kernel;

}  // namespace fastast::mel
