// fastast::mel_filterbank (fastast/ops/mel_filterbank.py) for a device, through LibTorch's stable
// ABI: built with one PyTorch, it loads with later ones.

#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

#include "task.h"

namespace fastast::mel {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Fills in a task and its output and hands it to `kRun`. `Run` is void(const Task&, device index).
template <void (*kRun)(const Task&, std::int32_t)>
Tensor mel_filterbank(Tensor waveforms, Tensor sample_offsets, Tensor frame_shift,
                      Tensor frame_offsets, Tensor window, Tensor mel_bins, Tensor mel_taps,
                      Tensor mel_starts, std::optional<Tensor> dither_keys, std::int64_t num_rows,
                      std::int64_t fft_size, std::int64_t padding, double dither, bool remove_dc,
                      double preemphasis, bool magnitude, double floor, double offset,
                      double log_scale, std::optional<double> mean, std::optional<double> std,
                      bool bfloat16) {
  using torch::stable::contiguous;
  waveforms = contiguous(waveforms);
  sample_offsets = contiguous(sample_offsets);
  frame_shift = contiguous(frame_shift);
  frame_offsets = contiguous(frame_offsets);
  if (dither_keys) dither_keys = contiguous(*dither_keys);
  window = contiguous(window);
  mel_bins = contiguous(mel_bins);
  mel_taps = contiguous(mel_taps);
  mel_starts = contiguous(mel_starts);
  STD_TORCH_CHECK(sample_offsets.numel() == frame_shift.numel() + 1 &&
                      frame_offsets.numel() == frame_shift.numel() + 1,
                  "sample_offsets and frame_offsets must have one entry more than frame_shift");
  STD_TORCH_CHECK(dither == 0.0 || (dither_keys && dither_keys->numel() == frame_shift.numel()),
                  "dither needs a dither_keys entry for each clip");
  STD_TORCH_CHECK(mel_bins.numel() == mel_taps.numel(), "mel_taps must go with mel_bins");
  STD_TORCH_CHECK(window.numel() <= fft_size, "window is longer than fft_size");
  const Tensor out =
      torch::stable::new_empty(waveforms, {num_rows, mel_starts.numel() - 1},
                               bfloat16 ? ScalarType::BFloat16 : ScalarType::Float);
  Task task{};
  task.waveforms = waveforms.const_data_ptr();
  task.num_samples = waveforms.numel();
  task.sample_offsets = sample_offsets.const_data_ptr<std::int64_t>();
  task.frame_shift = frame_shift.const_data_ptr<std::int32_t>();
  task.frame_offsets = frame_offsets.const_data_ptr<std::int32_t>();
  task.num_clips = frame_shift.numel();
  task.window = window.const_data_ptr<float>();
  task.mel_bins = mel_bins.const_data_ptr<std::int64_t>();
  task.mel_taps = mel_taps.const_data_ptr<float>();
  task.mel_starts = mel_starts.const_data_ptr<std::int64_t>();
  task.dither_keys =
      dither != 0.0 ? dither_keys->const_data_ptr<std::int64_t>() : nullptr;
  task.out = out.mutable_data_ptr();
  task.num_rows = num_rows;
  task.window_length = static_cast<std::int32_t>(window.numel());
  task.num_mels = static_cast<std::int32_t>(mel_starts.numel() - 1);
  task.num_taps = static_cast<std::int32_t>(mel_taps.numel());
  task.fft_size = static_cast<std::int32_t>(fft_size);
  task.padding = static_cast<Padding>(padding);
  task.dither = static_cast<float>(dither);
  task.preemphasis = static_cast<float>(preemphasis);
  task.floor = static_cast<float>(floor);
  task.offset = static_cast<float>(offset);
  task.log_scale = static_cast<float>(log_scale);
  task.mean = static_cast<float>(mean.value_or(0.0));
  task.scale = static_cast<float>(0.5 / std.value_or(0.5));
  task.remove_dc = remove_dc;
  task.magnitude = magnitude;
  task.int16_samples = waveforms.scalar_type() == ScalarType::Short;
  task.bfloat16_out = bfloat16;
  if (num_rows > 0) kRun(task, waveforms.get_device_index());
  return out;
}

// What the kernels have no code for goes, with the same arguments, to the operator in terms of
// PyTorch's own: other sizes of the transform, other dtypes of the waveforms.
template <void (*kRun)(const Task&, std::int32_t)>
void boxed_mel_filterbank(StableIValue* stack, std::uint64_t inputs, std::uint64_t outputs) {
  constexpr int kWaveforms = 0, kFftSize = 10;
  using torch::stable::detail::to;
  std::int32_t dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(to<AtenTensorHandle>(stack[kWaveforms]), &dtype));
  const auto fft_size = to<std::int64_t>(stack[kFftSize]);
  const bool supported =
      fft_size >= kSmallestFft && fft_size <= kLargestFft && (fft_size & (fft_size - 1)) == 0 &&
      (dtype == aoti_torch_dtype_float32() || dtype == aoti_torch_dtype_int16());
  if (supported) {
    TORCH_BOX(&mel_filterbank<kRun>)(stack, inputs, outputs);
  } else {
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("fastast::mel_filterbank_portable", "", stack,
                                                 TORCH_ABI_VERSION));
  }
}

}  // namespace fastast::mel
