// The filterbank on a CPU: checks of the arguments, choice of the kernel, division among threads.

#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "kernel.h"

namespace fastast::mel {

// Calls its argument with ranges that cover 0 .. count - 1, perhaps from several threads.
using ParallelFor = std::function<void(
    std::int64_t count, const std::function<void(std::int64_t begin, std::int64_t end)>& body)>;

// The kernels that this machine can run, the fastest first.
const std::vector<const CpuKernel*>& cpu_kernels();

// Writes task.out.
// Throws std::invalid_argument, whose text names the clip, if frames do not fit into the clips.
void run_on_cpu(const Task& task, const CpuKernel& kernel, const ParallelFor& parallel_for);

}  // namespace fastast::mel
