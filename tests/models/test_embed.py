"""Embeddings of clips: what the linear classifier reads."""

import pytest
import torch
from torch import nn

from fastast import AST, SSAST, ASiT, ElasticAST, Spectrograms

CLASSES, MELS = 5, 16
SIZE = {"num_mels": MELS, "patch_size": (4, 4), "dim": 24, "depth": 2, "num_heads": 3}
MODELS = {
    "elastic-attention": lambda: ElasticAST(CLASSES, max_time_patches=16, **SIZE),
    "elastic-mean": lambda: ElasticAST(CLASSES, max_time_patches=16, pool="mean", **SIZE),
    "ast": lambda: AST(CLASSES, input_frames=40, stride=(4, 3), **SIZE),
    "asit": lambda: ASiT(CLASSES, input_frames=40, stride=(4, 3), **SIZE),
    "ssast-mean": lambda: SSAST(CLASSES, input_frames=40, stride=(4, 3), **SIZE),
    "ssast-cls": lambda: SSAST(CLASSES, input_frames=40, stride=(4, 3), pool="cls", **SIZE),
}


@pytest.fixture(params=MODELS.values(), ids=MODELS)
def model(request) -> nn.Module:
    torch.manual_seed(0)
    model = request.param()
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.2)
    return model.double()


def pooled(model: nn.Module, clip: torch.Tensor) -> torch.Tensor:
    """From the tokens of a clip, written out."""
    tokens, grid = model.forward_features(clip[None])
    if isinstance(model, SSAST) and model.pool == "mean":
        return model.norm(tokens[2:].mean(0))
    if isinstance(model, AST | SSAST):
        return model.norm(tokens[:2].mean(0))
    if isinstance(model, ASiT):
        return model.norm(tokens[0])
    return model.norm(model.pool(tokens, grid.segments))[0]


@torch.inference_mode()
def test_embeddings_are_the_pooled_tokens_and_make_the_logits(model):
    clips = [torch.randn(frames, MELS, dtype=torch.float64) for frames in (17, 40, 8, 90)]
    inputs = Spectrograms.from_list(clips)
    embeddings = model.embed(inputs)
    expected = torch.stack([pooled(model, clip) for clip in clips])
    assert embeddings.shape == (4, SIZE["dim"])
    torch.testing.assert_close(embeddings, expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(model.head(embeddings), model(inputs))
