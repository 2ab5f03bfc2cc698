"""Original layout, ours, and back: not a bit is lost."""

import pytest
import torch

from fastast import create_model, create_pretraining_model, from_reference, to_reference
from fastast.interop.checkpoint import family_of
from tests.interop.test_ssast import formula_weights
from tests.ssl_golden import SslGolden
from tests.testing import Golden

FIXTURES = {
    "ast_tiny224_s10_t128_c35_b2": ("ast", {}),
    "elastic_d192_l12_c35_s5": ("elastic_ast", {}),
    "elastic_d192_l12_c35_s5_avgpool": ("elastic_ast", {"pool": "mean"}),
    "flexi_fwd_vitb_t1024_c309_b1": ("flexi_ast", {}),
    "ssast_pre_tiny_patch_m400_b3": ("ssast", {}),
    "ssast_pre_tiny_frame_m400_b2": ("ssast", {}),
    "htsat_audioset_10s": ("hts_at", {}),
}
# What the originals have beside what they use, make anew from sizes, or what cancels.
UNUSED = ("v.head", "head.", "spectrogram_extractor.", "logmel_extractor.", "attn_pool")
FROM_SIZES = (".attn_mask", ".relative_position_index")


def weights_of(shared_dir, name):
    if name.startswith("htsat"):
        return SslGolden(shared_dir, name).state_dict()
    fixture = Golden(shared_dir / "fixtures" / "ast_family", name)
    if name.startswith("ssast"):
        entry = fixture.entry
        return formula_weights(entry["state_dict"], torch.float32, entry["constructor"])
    return fixture.state_dict()


@pytest.mark.parametrize("name", FIXTURES)
def test_original_ours_original(shared_dir, name):
    family, config = FIXTURES[name]
    before = weights_of(shared_dir, name)
    assert family_of(before) == family
    before = {key.removeprefix("module."): value for key, value in before.items()}
    model = from_reference(before, family, config)
    after = to_reference(model, family)
    for key, value in after.items():
        if key == "attn_pool.to_kv.bias":  # whose first half cancels in the softmax
            value, before[key] = value.chunk(2)[1], before[key].chunk(2)[1]
        assert value.shape == before[key].shape and torch.equal(value, before[key]), key
    for key in before.keys() - after.keys():
        plain = key.removeprefix("sed_model.")
        assert plain.startswith(UNUSED) or plain.endswith(FROM_SIZES), key
    again = from_reference(after, family, config).state_dict()
    assert all(torch.equal(value, again[key]) for key, value in model.state_dict().items())


SMALL = {"dim": 64, "depth": 2, "num_heads": 1}
OURS = {
    "audio_mae": lambda: create_model("audio_mae_tiny", 5, **SMALL),
    "ast": lambda: create_model("ast_tiny", 5, input_frames=200, **SMALL),
    "elastic_ast": lambda: create_model("elastic_ast_tiny", 5, **SMALL),
    "flexi_ast": lambda: create_model("flexi_ast_tiny", 5, input_frames=208, **SMALL),
    "ssast": lambda: create_model("ssast_patch_tiny", 5, input_frames=200, **SMALL),
    "hts_at": lambda: create_model(
        "hts_at_tiny", 5, dim=16, depths=(1,) * 4, num_heads=(1,) * 4, fit="stretch"
    ),
    "transformers": lambda: create_model("ast_tiny", 5, input_frames=200, **SMALL),
}


@pytest.mark.parametrize("family", OURS)
def test_ours_original_ours(family):
    """Models that were trained here give the same logits, ElasticAST's scale among them."""
    torch.manual_seed(0)
    model = OURS[family]().eval()
    config = {"max_length": 200, "num_attention_heads": 1} if family == "transformers" else {}
    back = from_reference(to_reference(model, family), family, config)
    if family == "transformers":
        assert back.trunk.norm.eps == 1e-12  # that library's; ours is 1e-6
        for ours, theirs in zip(model.modules(), back.modules(), strict=True):
            if isinstance(ours, torch.nn.LayerNorm):
                theirs.eps = ours.eps
    frames = torch.randn(2, 200, model.geometry.num_mels)
    with torch.inference_mode():
        torch.testing.assert_close(back(frames), model(frames), rtol=1e-5, atol=1e-6)


def test_pretraining_round_trip():
    model = create_pretraining_model("ssast_patch_tiny", input_frames=160, **SMALL)
    back = from_reference(to_reference(model), "ssast").state_dict()
    assert all(torch.equal(value, back[key]) for key, value in model.state_dict().items())


def test_autoencoder_round_trip():
    kinds = [{"attention": "local", "shift": "time", "decoder_heads": 2}, {"attention": "global"}]
    size = {"decoder_dim": 32, "decoder_depth": 2}
    for kind in kinds:
        model = create_pretraining_model("audio_mae_tiny", **kind, **size, **SMALL)
        back = from_reference(to_reference(model), "audio_mae").state_dict()
        assert all(torch.equal(value, back[key]) for key, value in model.state_dict().items())
    for kind, message in (
        ({"attention": "hybrid", "decoder_global": 1}, "no hybrid decoder"),
        ({"attention": "local"}, r"this has 4, shifted by \(2, 2\)"),
    ):
        model = create_pretraining_model("audio_mae_tiny", **kind, **size, **SMALL)
        with pytest.raises(ValueError, match=message):
            to_reference(model)


def test_families_that_do_not_fit():
    with pytest.raises(ValueError, match="family transformers has no ElasticAST"):
        to_reference(OURS["elastic_ast"](), "transformers")
    with pytest.raises(ValueError, match="of its own has no Linear: there are AST"):
        to_reference(torch.nn.Linear(2, 2))
