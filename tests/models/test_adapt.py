"""Weights at another time resolution."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastast import create_model
from fastast.models.adapt import Change, adapt_state_dict
from fastast.tokens import GridPositions
from tests.testing import formula_weight

SIZE = {"num_mels": 32, "dim": 16, "depth": 1, "num_heads": 1}


def ast(frames, patch=(16, 8), **settings):
    return create_model(
        "ast_tiny", 3, input_frames=frames, patch_size=patch, stride=patch, **SIZE, **settings
    )


def adapted(before, after, **change):
    return adapt_state_dict(before.state_dict(), before, after, Change(**change))


def test_ast_s_table_is_an_image_that_grows():
    before, after = ast(32), ast(128)
    found = adapted(before, after, time_scale=1 / 4)
    table = before.positions.table.detach()
    image = table[2:].reshape(1, 2, 4, 16).permute(0, 3, 1, 2)
    expected = F.interpolate(image, (2, 16), mode="bilinear", align_corners=False)
    torch.testing.assert_close(
        found["positions.table"][2:].reshape(2, 16, 16), expected[0].permute(1, 2, 0)
    )
    assert torch.equal(found["positions.table"][:2], table[:2])
    unchanged = [name for name in found if name != "positions.table"]
    assert all(torch.equal(found[name], before.state_dict()[name]) for name in unchanged)
    after.load_state_dict(found)


def test_a_clip_has_the_positions_it_would_have_had_by_interpolation():
    """What GridPositions does on the fly for a longer clip, adapting does once and for all."""
    before, after = ast(32), ast(128)
    grid = after.geometry.grid([128])
    expected = before.positions(grid)
    after.load_state_dict(adapted(before, after))
    torch.testing.assert_close(after.positions(grid), expected)


def test_ast_s_own_adaptation(shared_dir):
    stored = np.load(shared_dir / "fixtures" / "ast_family" / "ast_pos_as12x101_to_12x149.npz")
    before, after = GridPositions(2, 12, 101, 768), GridPositions(2, 12, 149, 768)
    table = formula_weight("v.pos_embed", [1, 1214, 768])[0]
    found = adapt_state_dict({"table": table}, before, after)["table"]
    channels = torch.from_numpy(stored["pos_embed_ch8"])
    torch.testing.assert_close(found[:, :8], channels.reshape(1790, 8), rtol=0, atol=4e-6)


def test_elastic_columns_keep_their_place_in_time():
    """A column of the fine table lies between the coarse ones that surround it in time."""
    model = create_model("elastic_ast_tiny", 3, max_time_patches=8, patch_size=(16, 4), **SIZE)
    with torch.no_grad():
        model.positions.time.copy_(torch.arange(8.0)[:, None].expand(8, 16))
    time = adapted(model, model, time_scale=1 / 4)["positions.time"][:, 0]
    # Column j covers the time (j + 1/2) / 4 of a coarse column, whose own middle is at 1/2.
    expected = [0, 0, 0.125, 0.375, 0.625, 0.875, 1.125, 1.375]
    torch.testing.assert_close(time, torch.tensor(expected))
    assert torch.equal(adapted(model, model)["positions.time"], model.positions.time)
    longer = create_model("elastic_ast_tiny", 3, max_time_patches=10, patch_size=(16, 4), **SIZE)
    assert adapted(model, longer)["positions.time"][:, 0].tolist() == [*range(8), 7, 7]


@pytest.mark.parametrize("kernel", ["bilinear", "pi"])
def test_wide_patches_become_narrow(kernel):
    before, after = ast(128, (16, 32)), ast(128)
    found = adapted(before, after, time_scale=1 / 4, kernel=kernel)
    assert found["patch_embed.proj.weight"].shape == (16, 16 * 8)
    after.load_state_dict(found)


def test_pooled_frames_change_positions_alone():
    before, after = ast(128, time_pool=4), ast(128)
    found = adapted(before, after, time_scale=1 / 4)
    changed = [
        name
        for name, value in before.state_dict().items()
        if value.shape != found[name].shape or not torch.equal(value, found[name])
    ]
    assert changed == ["positions.table"]


def test_only_some_tensors_and_structure_alone():
    with torch.device("meta"):
        before, after = ast(32), ast(128)
    moments = {"positions.table": torch.randn(10, 16), "trunk.norm.bias": torch.randn(16)}
    found = adapt_state_dict(moments, before, after)
    assert found["positions.table"].shape == (34, 16)
    assert found["trunk.norm.bias"] is moments["trunk.norm.bias"]


def test_what_nothing_is_known_about_says_so():
    before, after = torch.nn.Linear(2, 3), torch.nn.Linear(2, 4)
    with pytest.raises(ValueError, match=r"weight is \(3, 2\), and \(4, 2\) at the other time"):
        adapt_state_dict(before.state_dict(), before, after)
    with pytest.raises(ValueError, match="time_scale must be positive"):
        Change(time_scale=0.0)
    with pytest.raises(ValueError, match="kernel must be 'bilinear' or 'pi'"):
        Change(kernel="nearest")
