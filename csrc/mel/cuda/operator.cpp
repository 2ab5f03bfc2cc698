// The operator's kernel for CUDA tensors. What frames and clips hold is on the device and not
// looked at; a frame that does not lie in its clip reads zeros or the clip's mirror image.

#define USE_CUDA  // of the shim's header: streams
#include "../operator.h"

#include <stdexcept>
#include <string>

#include "kernel.h"

namespace {

void run(const fastast::mel::Task& task, std::int32_t device) {
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const int error = fastast::mel::launch(task, stream);
  if (error) throw std::runtime_error("mel_filterbank: CUDA error " + std::to_string(error));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastast, CUDA, m) {
  m.impl("mel_filterbank", &fastast::mel::boxed_mel_filterbank<run>);
}
