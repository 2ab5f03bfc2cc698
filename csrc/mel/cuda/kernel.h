// The GPU's kernel, for code that is not compiled by nvcc.

#pragma once

#include "../task.h"

namespace fastast::mel {

// Starts the one launch of a call on a stream (a cudaStream_t). Returns a cudaError_t.
int launch(const Task& task, void* stream);

}  // namespace fastast::mel
