"""ASiT's converted weights reproduce what the published code computed."""

import argparse

import numpy as np
import pytest
import torch

from fastast import ASiT, ASiTPretraining, Spectrograms, from_reference, to_reference
from fastast.interop.checkpoint import family_of, read_checkpoint
from fastast.methods import MaskedDistillation
from fastast.methods.asit import centering
from fastast.models import create_pretraining_model
from fastast.schedules import cosine
from fastast.tokens import GMML
from fastast.tokens.gmml import Corrupted
from tests.ssl_golden import SslGolden, dot_probe
from tests.testing import formula, formula_input

FREQ, TIME = 8, 37
VIEWS, CLIPS, FRAMES, MELS = 2, 2, 592, 128


@pytest.fixture(scope="module")
def golden(shared_dir):
    return SslGolden(shared_dir, "asit_vitb")


def published(fixture):
    """The weights that the original ran with; it makes the lengths of the classes' rows itself."""
    weights = fixture.state_dict()
    return {key: torch.ones_like(x) if "weight_g" in key else x for key, x in weights.items()}


@pytest.fixture(scope="module")
def method(golden):
    """The published code's variant of the method, with its weights."""
    model = from_reference(published(golden), "asit")
    code = {"local_tokens": "all", "reconstruction_weight": 2.0, "teacher_temp_epochs": 30}
    return MaskedDistillation(model, None, GMML(ratio=(0.5, 0.7)), **code)


def by_view(x):
    """Rows of the fixture, all first views before all second ones: clip by clip."""
    return x.unflatten(0, (VIEWS, CLIPS)).transpose(0, 1).flatten(0, 1)


def in_its_order(x):
    """``[clips * 2, ...]`` in the order of the fixture."""
    return x.unflatten(0, (CLIPS, VIEWS)).transpose(0, 1).flatten(0, 1)


def by_time(tokens):
    """Tokens ``[views, 1 + 8 * 37, ...]`` frequency by frequency, in the order of the fixture."""
    patches = tokens[:, 1:].unflatten(1, (FREQ, TIME)).transpose(1, 2).flatten(1, 2)
    return in_its_order(torch.cat([tokens[:, :1], patches], 1))


@pytest.fixture(scope="module")
def views(golden):
    """Clean and corrupted views, packed; segments 2 i and 2 i + 1 are of clip i."""
    clean = formula_input("input", (VIEWS, CLIPS, FRAMES, MELS))
    bits = torch.from_numpy(np.unpackbits(golden.arrays["mask_bits"], axis=-1)).bool()
    mask = bits.view(VIEWS, CLIPS, FRAMES, MELS)
    corrupted = clean.clone()
    for view in range(VIEWS):
        for clip, partner in enumerate(golden.arrays["alien_partner"][view]):
            value = clean[view, partner] if partner >= 0 else torch.zeros(())
            corrupted[view, clip] = torch.where(mask[view, clip], value, clean[view, clip])
    whole, seen, replaced = (
        Spectrograms.from_list(list(by_view(x.flatten(0, 1)))) for x in (clean, corrupted, mask)
    )
    return whole, Corrupted(seen, replaced.frames, torch.zeros(4, dtype=torch.bool))


@pytest.fixture(scope="module")
def encoded(method, views):
    """What the method computes, and the tokens and pixels underway."""
    clean, corrupted = views
    found, parts = {}, {"teacher": method.teacher.trunk, "student": method.model.trunk}
    parts["pixels"] = method.model.decoder
    handles = [
        part.register_forward_hook(lambda _, __, out, name=name: found.__setitem__(name, out))
        for name, part in parts.items()
    ]
    with torch.inference_mode():
        result = method.encode(clean, corrupted, method.model.geometry.grid(clean.segments))
    for handle in handles:
        handle.remove()
    return result, {name: by_time(rows.unflatten(0, (4, -1))) for name, rows in found.items()}


@torch.inference_mode()
def test_tokens_heads_and_decoder(golden, encoded):
    result, rows = encoded
    for name in ("teacher", "student"):
        golden.check_tokens(f"{name}_tokens", rows[name])
        golden.check(f"{name}_cls_feature", rows[name][:, 0])
        assigned = getattr(result, name)
        logits = in_its_order(assigned.global_logits)
        golden.check(f"{name}_cls_logits_first64", logits[:, :64])
        golden.check(f"{name}_cls_logsumexp", logits.logsumexp(1))
        golden.check(f"{name}_cls_sharp_lse", (logits / 0.1).logsumexp(1))
        logits = by_time(assigned.local_logits.unflatten(0, (4, -1)))[:, 1:]
        golden.check(f"{name}_local_logits_first", logits[:, :8, :64])
        golden.check(f"{name}_local_logsumexp", logits.logsumexp(2))
        golden.check(f"{name}_local_sharp_lse", (logits / 0.1).logsumexp(2))

    pixels = rows["pixels"][:, 1:]
    patches = pixels.unflatten(1, (TIME, FREQ)).unflatten(3, (16, 16)).transpose(3, 4)
    image = patches.transpose(2, 3).flatten(3, 4).flatten(1, 2)
    golden.check("recons_corner", image[:, :32, :32])
    golden.check("recons_patch_mean", patches.mean((3, 4)))
    golden.check("recons_patch_std", patches.std((3, 4), unbiased=False))
    golden.check("recons_patch_probe", dot_probe(patches.flatten(3)))


@torch.inference_mode()
def test_losses_and_centres(golden, method, encoded):
    result, _ = encoded
    centers = {
        "local": torch.from_numpy(formula("loss_data.center", 1024)).float(),
        "global": torch.from_numpy(formula("loss_cls.center", 8192)).float(),
    }
    temps = [method._teacher_temp(torch.tensor(epoch)) for epoch in golden.case["epochs"]]
    golden.check("teacher_temps", torch.stack(temps))
    patches = torch.ones(4, 1 + FREQ * TIME, dtype=torch.bool)
    patches[:, 0] = False
    patches = patches.flatten()
    local, global_ = torch.empty(2, len(temps), 2)
    for column, factor in enumerate((1, 0)):
        for name, center in centers.items():
            getattr(method, f"{name}_center").copy_(factor * center)
        for row, temp in enumerate(temps):
            rows, views = method.divergence(result, temp)
            local[row, column], global_[row, column] = rows[patches].mean(), views.mean()
    reconstruction = result.errors.sum() / result.replaced.sum()
    golden.check("loss_recon", reconstruction)
    golden.check("loss_cls", global_)
    golden.check("loss_data", local)
    golden.check("total", global_ + local + method.reconstruction_weight * reconstruction)

    sums = centering(result.teacher, patches, torch.ones(4, dtype=torch.bool))
    for suffix, factor in (("after", 1), ("after_from_zero_first64", 0)):
        for name, center in centers.items():
            getattr(method, f"{name}_center").copy_(factor * center)
        method.after_step(sums, done=1.0)
        size = 64 if factor == 0 else None
        golden.check(f"center_cls_{suffix}", method.global_center[None, :size])
        golden.check(f"center_data_{suffix}", method.local_center[None, :size])


def test_momentum(golden, shared_dir):
    model = create_pretraining_model("asit_small", dim=8, depth=1, num_heads=1, patch_size=(4, 4))
    method = MaskedDistillation(model, None, GMML())
    weight, teacher = model.patch_embed.proj.weight, method.teacher.patch_embed.proj.weight
    with torch.no_grad():
        for name, into in (("ema_student", weight), ("ema_teacher", teacher)):
            into.copy_(torch.from_numpy(formula(name, 128)).view(8, 16))
    method.after_step(torch.zeros(1024 + 8192 + 2), done=0.0)
    golden.check("ema_teacher_after", teacher.view(16, 8))

    stored = SslGolden(shared_dir, "asit_schedules")
    for name in ("momentum", "weight_decay"):
        settings = stored.case["constructor_args"][name]
        start, end, epochs, steps = settings["args(base,final,epochs,niter_per_ep,warmup_epochs)"]
        shares = [index / (epochs * steps) for index in settings["indices"]]
        stored.check(name, np.array([cosine(start, end, share) for share in shares]))


# Weights in the published layout, of a small model.


@pytest.fixture
def small():
    torch.manual_seed(0)
    size = {"input_frames": 36, "num_mels": 24, "patch_size": (8, 4), "dim": 64, "num_heads": 1}
    classes = {"hidden": 12, "bottleneck": 8, "local_classes": 5, "global_classes": 7}
    return ASiTPretraining(depth=2, **size, **classes, as_code=True)


MELS_OF_SMALL = {"num_mels": 24}


def test_every_weight_is_taken_over(small):
    weights = to_reference(small)
    assert family_of(weights) == "asit"
    found = from_reference(
        {f"module.{key}": x for key, x in weights.items()}, "asit", MELS_OF_SMALL
    )
    for name, value in small.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name
    for layer in ("cls_layer", "data_layer"):  # as newer versions of PyTorch name them
        for index, part in enumerate("gv"):
            new = f"head_cls.{layer}.parametrizations.weight.original{index}"
            weights[new] = weights.pop(f"head_cls.{layer}.weight_{part}")
    found = from_reference(weights, "asit", MELS_OF_SMALL)
    for name, value in small.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name


def test_layout(golden):
    """What is exported has the original's keys and shapes."""
    model = create_pretraining_model("asit_base", num_heads=12, as_code=True)
    found = {key: list(x.shape) for key, x in to_reference(model).items()}
    assert found == {key: entry["shape"] for key, entry in golden.tensors.items()}


def test_fine_tuning_starts_from_the_teacher(small, tmp_path):
    weights = to_reference(small)
    student = {f"module.{key}": torch.zeros_like(x) for key, x in weights.items()}
    args = argparse.Namespace(epochs=3)
    checkpoint = {"student": student, "teacher": weights, "epoch": 3, "args": args}
    torch.save(checkpoint, tmp_path / "checkpoint.pth")
    found = read_checkpoint(tmp_path / "checkpoint.pth").weights
    config = MELS_OF_SMALL | {"num_classes": 3, "input_frames": 60, "stride": (8, 2)}
    model = from_reference(found, "asit", config)
    assert isinstance(model, ASiT) and model.positions.grid == (3, 29)
    assert torch.equal(model.patch_embed.proj.weight, small.patch_embed.proj.weight)
    assert torch.equal(model.trunk.norm.bias, small.trunk.norm.bias)
    assert model(torch.zeros(2, 20, 24)).shape == (2, 3)


def test_what_does_not_fit_says_so(small):
    weights = to_reference(small)
    with pytest.raises(ValueError, match="does not fill 10 rows of frequency"):
        from_reference(weights, "asit", {"num_mels": 80})
    with pytest.raises(ValueError, match=r"num_heads \(2\) differs from the pre-trained 1"):
        ASiT(2, patch_size=(8, 4), dim=64, depth=2, num_heads=2).start_from(small)
    weights["head_cls.cls_layer.weight_g"] *= 2
    with pytest.raises(ValueError, match=r"head_cls\.cls_layer has rows of other lengths than 1"):
        from_reference(weights, "asit", MELS_OF_SMALL)
    with pytest.raises(ValueError, match="is it of the asit family"):
        from_reference({"backbone.cls_token": torch.zeros(1, 1, 8)}, "asit")
    with pytest.raises(ValueError, match="two separate heads"):
        to_reference(create_pretraining_model("asit_small", dim=8, depth=1, num_heads=1))
