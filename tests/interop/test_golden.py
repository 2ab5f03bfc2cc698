"""Converted models reproduce what the original implementations computed."""

import pytest
import torch

from fastast import Spectrograms, from_reference
from tests.testing import Golden, formula, formula_input, formula_weight


@pytest.fixture
def golden(shared_dir):
    return lambda name: Golden(shared_dir / "fixtures" / "ast_family", name)


@pytest.mark.parametrize(
    "name, dtype",
    [
        ("ast_tiny224_s10_t128_c35_b2", torch.float32),
        ("ast_tiny224_s10_t128_c35_b2", torch.float64),
        ("ast_base384_s10_t1024_c527_b2", torch.float32),
    ],
)
@torch.inference_mode()
def test_ast(golden, name, dtype):
    fixture = golden(name)
    model = from_reference(fixture.state_dict(dtype), "ast")
    batch = formula_input("input", tuple(fixture.entry["input"]["shape"])).to(dtype)
    fixture.check("logits", model(batch))
    fixture.check("logits", model(Spectrograms.from_list(list(batch))))


@pytest.mark.parametrize(
    "name, pool, dtype",
    [
        ("elastic_d192_l12_c35_s5", "attention", torch.float32),
        ("elastic_d192_l12_c35_s5", "attention", torch.float64),
        ("elastic_d192_l12_c35_s5_avgpool", "mean", torch.float32),
        ("elastic_d192_l12_c35_s5_avgpool", "mean", torch.float64),
        ("elastic_d768_l12_c527_s6", "attention", torch.float32),
    ],
)
@torch.inference_mode()
def test_elastic_ast(golden, name, pool, dtype):
    fixture = golden(name)
    limits = fixture.entry["group_max_seq_len"]
    model = from_reference(fixture.state_dict(dtype), "elastic_ast", {"pool": pool})
    clips = [
        formula_input(f"input.{i}", tuple(shape)).to(dtype)
        for i, shape in enumerate(fixture.entry["input"]["shape"])
    ]
    logits = model(Spectrograms.from_list(clips))
    for limit in limits:  # the original's result does not depend on how it packs
        fixture.check(f"logits_limit{limit}", logits)
    alone = torch.cat([model(clip[None]) for clip in clips])
    fixture.check(f"logits_limit{limits[0]}", alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@torch.inference_mode()
def test_flexi_ast(golden, dtype):
    fixture = golden("flexi_fwd_vitb_t1024_c309_b1")
    weights = fixture.state_dict(dtype)
    for key, shape in fixture.entry["state_dict_stale"]:  # of the model that training began from
        weights[key] = formula_weight("another", shape).to(dtype)
    model = from_reference(weights, "flexi_ast")
    batch = formula_input("input", tuple(fixture.entry["input"]["shape"])).to(dtype)
    stream = Spectrograms.from_list(list(batch))
    for side in fixture.entry["patch_sizes"]:
        size = (side, side)
        grid = model.geometry_of(size).grid(stream.segments)
        fixture.check(f"logits_p{side}", model(batch, patch_size=size))
        if dtype == torch.float32:
            tokens = model.tokens(stream.frames, grid)
            check_tokens(fixture, f"tokens_posadd_p{side}", tokens)
            features, _ = model.forward_features(stream, grid)
            check_tokens(fixture, f"tokens_norm_p{side}", features)
            fixture.check(f"logits_p{side}", model.head(model.embed(stream, grid)))
    bilinear = from_reference(weights, "flexi_ast", {"resize": "bilinear"})
    fixture.check("logits_bl_p24", bilinear(batch, patch_size=(24, 24)))


def check_tokens(fixture, name, tokens):
    """Compares tokens ``[rows, dim]`` with what is stored of them."""
    fixture.check(f"{name}_first4", tokens[None, :4])
    wide = tokens.double()
    probe = torch.from_numpy(50 * formula("probe", tokens.shape[1]))
    summaries = {"mean": wide.mean(1), "std": wide.std(1, correction=0), "probe": wide @ probe}
    for part, value in summaries.items():
        fixture.check_summary(f"{name}_{part}", value)


def test_wrong_family_says_so(golden):
    fixture = golden("elastic_d192_l12_c35_s5")
    with pytest.raises(ValueError, match=r"v\.patch_embed\.proj\.weight.*ast family"):
        from_reference(fixture.state_dict(), "ast")
    with pytest.raises(ValueError, match="family must be one of"):
        from_reference({}, "resnet")


def test_damaged_weights_say_so(golden):
    weights = golden("elastic_d192_l12_c35_s5").state_dict()
    weights["module.head.bias"] = weights["module.head.bias"][:3]
    with pytest.raises(ValueError, match="does not fit the elastic_ast family"):
        from_reference(weights, "elastic_ast")
    with pytest.raises(ValueError, match="is it of the ast family"):
        from_reference({"v.patch_embed.proj.weight": torch.zeros(8, 1, 16, 16)}, "ast")
