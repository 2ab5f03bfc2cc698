// The operator's kernel for CPU tensors.

#include "../operator.h"

#include "filterbank.h"

namespace {

void run(const fastast::mel::Task& task, std::int32_t) {
  // PyTorch's own threads, as many as torch.set_num_threads() says.
  const auto parallel_for = [](std::int64_t count, const auto& body) {
    torch::stable::parallel_for(0, count, 1, body);
  };
  fastast::mel::run_on_cpu(task, *fastast::mel::cpu_kernels().front(), parallel_for);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastast, CPU, m) {
  m.impl("mel_filterbank", &fastast::mel::boxed_mel_filterbank<run>);
}
