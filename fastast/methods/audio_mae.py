import torch
from torch import Tensor


def patch_errors(prediction: Tensor, patches: Tensor, normalise: bool) -> Tensor:
    target = patches.to(torch.promote_types(patches.dtype, torch.float32))
    if normalise:
        variance, mean = torch.var_mean(target, 1, keepdim=True)
        target = (target - mean) * (variance + 1e-6).rsqrt()
    return (prediction.to(target.dtype) - target).square().mean(1)
