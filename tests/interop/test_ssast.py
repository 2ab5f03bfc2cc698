"""Converted SSAST models reproduce what the original computed, pre-training and fine-tuned."""

import pytest
import torch

from fastast import SSAST, Spectrograms, from_reference
from fastast.ops import info_nce
from tests.testing import Golden, formula, formula_input, formula_weight

FINE_TUNED = {
    "ssast_ft_tiny_patch_t128_c35_b2": (torch.float32, torch.float64),
    "ssast_ft_tiny_patch_t1024_c527_b2": (torch.float32,),
    "ssast_ft_tiny_frame_t600_c50_b2": (torch.float32, torch.float64),
    "ssast_ft_base_patch_t512_c50_b2": (torch.float32,),
    "ssast_ft_base_frame_t128_c35_b2": (torch.float32,),
}
PRE_TRAINED = {
    "ssast_pre_tiny_patch_m400_b3": (torch.float32, torch.float64),
    "ssast_pre_tiny_frame_m400_b2": (torch.float32, torch.float64),
    "ssast_pre_base_patch_m400_b2": (torch.float32,),
}


def each(fixtures):
    return [(name, dtype) for name, dtypes in fixtures.items() for dtype in dtypes]


@pytest.fixture
def golden(shared_dir):
    return lambda name: Golden(shared_dir / "fixtures" / "ast_family", name)


def formula_weights(shapes, dtype, settings):
    weights = {key: formula_weight(key, shape).to(dtype) for key, shape in shapes}
    for key in ("input_fdim", "input_tdim"):
        if f"module.p_{key}" in weights:
            weights[f"module.p_{key}"] = torch.tensor(settings[key])
    return weights


def probe(x):
    return x.double() @ torch.from_numpy(50 * formula("probe", x.shape[-1]))


def check_summary(fixture, name, x):
    """Asserts that mean, deviation and probe over the channels of ``x`` are as stored."""
    wide = x.double()
    summaries = {"mean": wide.mean(-1), "std": wide.std(-1, correction=0), "probe": probe(x)}
    for summary, value in summaries.items():
        stored = torch.from_numpy(fixture.arrays[f"{name}_{summary}"])
        atol = fixture.entry["arrays"][f"{name}_{summary}"]["suggested_atol"]
        torch.testing.assert_close(value, stored, rtol=0, atol=atol)


@pytest.mark.parametrize("name, dtype", each(FINE_TUNED))
@torch.inference_mode()
def test_fine_tuned(golden, name, dtype):
    fixture = golden(name)
    pretrained, finetune = (fixture.entry["constructor"][key] for key in ("pretrained", "finetune"))
    weights = formula_weights(fixture.entry["state_dict_pretrained"], dtype, pretrained)
    config = {
        "num_classes": finetune["label_dim"],
        "stride": (finetune["fstride"], finetune["tstride"]),
        "input_frames": finetune["input_tdim"],
    }
    batch = formula_input("input", tuple(fixture.entry["input"]["shape"])).to(dtype)
    clips, frames, _ = batch.shape
    for pool, task in (("mean", "avgtok"), ("cls", "cls")):
        model = from_reference(weights, "ssast", config | {"pool": pool})
        for part in ("weight", "bias"):  # the new classifier
            for index, layer in enumerate((model.norm, model.head)):
                parameter = getattr(layer, part)
                key = f"mlp_head.{index}.{part}"
                parameter.copy_(formula_weight(key, list(parameter.shape)))
        fixture.check(f"logits_{task}", model(batch))
        # Among clips of other lengths, each is as it is alone.
        other = torch.randn(frames // 3, 128, dtype=dtype)
        ragged = Spectrograms.from_list([other, *batch])
        fixture.check(f"logits_{task}", model(ragged)[1:])

    assert list(model.positions.grid) == fixture.arrays["grid"].tolist()
    if dtype == torch.float32:
        fixture.check("pos_embed_ch8", model.positions.table[:, :8])
        check_summary(fixture, "pos_embed", model.positions.table[None])
        tokens = model.forward_features(batch)[0].unflatten(0, (clips, -1))
        fixture.check("tokens_norm_first8", tokens[:, :8])
        check_summary(fixture, "tokens_norm", tokens)


@torch.inference_mode()
def test_a_fine_tuned_file(golden):
    fixture = golden("ssast_ft_tiny_patch_t128_c35_b2")
    settings = fixture.entry["constructor"]["finetune"]
    weights = formula_weights(fixture.entry["state_dict_finetune"], torch.float32, settings)
    pretrained = formula_weights(
        fixture.entry["state_dict_pretrained"],
        torch.float32,
        fixture.entry["constructor"]["pretrained"],
    )
    config = {"num_classes": 35, "input_frames": 128}
    table = from_reference(pretrained, "ssast", config).positions.table
    weights["module.v.pos_embed"] = table[None]
    batch = formula_input("input", tuple(fixture.entry["input"]["shape"]))
    for pool, task in (("mean", "avgtok"), ("cls", "cls")):
        model = from_reference(weights, "ssast", {"pool": pool})
        fixture.check(f"logits_{task}", model(batch))


@pytest.mark.parametrize("name, dtype", each(PRE_TRAINED))
@torch.inference_mode()
def test_pretraining(golden, name, dtype):
    fixture = golden(name)
    settings = fixture.entry["constructor"]
    model = from_reference(formula_weights(fixture.entry["state_dict"], dtype, settings), "ssast")
    batch = formula_input("input", tuple(fixture.entry["input"]["shape"])).to(dtype)
    clips = batch.shape[0]
    grid = model.geometry.grid([batch.shape[1]] * clips)
    packed = Spectrograms.from_list(list(batch))
    places = {
        key: 2 + torch.from_numpy(fixture.arrays[f"mask_{key}"]).long() for key in ("mpc", "mpg")
    }

    def restored(key, inputs, head):
        masked = torch.zeros(clips, grid.num_rows // clips, dtype=torch.bool)
        masked.scatter_(1, places[key], True)
        out = model(inputs, masked.flatten(), grid)
        prediction = head(out.features)
        return masked, prediction, out.patches

    def chosen(key, rows):
        """Rows of a stream at the masked places, in the original's order: ``[B, M, 256]``."""
        rows = rows.unflatten(0, (clips, -1))
        return rows.gather(1, places[key][..., None].expand(-1, -1, rows.shape[-1]))

    for inputs in (batch, packed):
        masked, prediction, patches = restored("mpc", inputs, model.discriminate)
        # The code's direction: for each target, a softmax over the predictions.
        nce = info_nce(patches, prediction, grid.segments, masked.flatten())
        losses = nce.loss.unflatten(0, (clips, -1)).sum(1) / 400
        correct = nce.found_query.unflatten(0, (clips, -1)).sum(1)
        masked, generated, targets = restored("mpg", inputs, model.generate)
        squares = (generated - targets).square().mean(1)
        mse = torch.where(masked.flatten(), squares, 0).unflatten(0, (clips, -1)).sum(1) / 400

        fixture.check("nce", losses.mean()[None])
        fixture.check("mse", mse.mean()[None])
        fixture.check("nce_per_sample", losses)
        fixture.check("mse_per_sample", mse)
        assert correct.tolist() == fixture.arrays["correct_per_sample"].tolist()
        assert correct.sum() == fixture.arrays["correct"][0]
        if dtype == torch.float32:
            fixture.check("total", (losses.mean() + 10 * mse.mean())[None])
            fixture.check("cpred_first4", chosen("mpc", prediction)[:, :4])
            fixture.check("gpred_first4", chosen("mpg", generated)[:, :4])
            fixture.check("target_first4", chosen("mpc", patches)[:, :4])
            for key, rows, name in (("mpc", prediction, "cpred"), ("mpg", generated, "gpred")):
                stored = torch.from_numpy(fixture.arrays[f"{name}_probe"])
                atol = fixture.entry["arrays"][f"{name}_probe"]["suggested_atol"]
                torch.testing.assert_close(probe(chosen(key, rows)), stored, rtol=0, atol=atol)


def test_fewer_frequencies_than_in_pretraining(golden):
    """The original fails here; the middle of the table is taken, as along time."""
    fixture = golden("ssast_pre_tiny_patch_m400_b3")
    weights = formula_weights(
        fixture.entry["state_dict"], torch.float32, fixture.entry["constructor"]
    )
    pretrained = from_reference(weights, "ssast")
    config = {"num_classes": 3, "num_mels": 64, "stride": (16, 16), "input_frames": 160}
    model = from_reference(weights, "ssast", config)
    assert isinstance(model, SSAST) and model.positions.grid == (4, 10)
    before = pretrained.positions.table[2:].unflatten(0, (8, 64))
    after = model.positions.table[2:].unflatten(0, (4, 10))
    assert torch.equal(after, before[2:6, 27:37])


def test_what_is_missing_says_so(golden):
    weights = {"v.patch_embed.proj.weight": torch.zeros(8, 1, 16, 16)}
    with pytest.raises(ValueError, match="is it of the ssast family"):
        from_reference(weights, "ssast")
