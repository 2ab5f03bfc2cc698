"""ImageNet weights: the encoder that is made of them, and the models that start from it."""

import pytest
import torch
import torch.nn.functional as F

from fastast import AST, ElasticAST, from_reference
from fastast.models.grid_vit import GridViT
from fastast.models.ssast import SSASTPretraining
from tests.testing import Golden, formula, formula_weight


@pytest.fixture
def golden(shared_dir):
    return lambda name: Golden(shared_dir / "fixtures" / "ast_family", name)


def vit_weights(dim=64, depth=2, side=4, patch=8, channels=3, tokens=("cls_token",)):
    """A small ViT's, by timm's names."""
    torch.manual_seed(0)
    shapes = {
        "patch_embed.proj.weight": (dim, channels, patch, patch),
        "patch_embed.proj.bias": (dim,),
        "pos_embed": (1, len(tokens) + side**2, dim),
        **dict.fromkeys(tokens, (1, 1, dim)),
        "norm.weight": (dim,),
        "norm.bias": (dim,),
        "head.weight": (10, dim),
        "head.bias": (10,),
    }
    for block in range(depth):
        for name, out, into in (
            ("attn.qkv", 3 * dim, dim),
            ("attn.proj", dim, dim),
            ("mlp.fc1", 4 * dim, dim),
            ("mlp.fc2", dim, 4 * dim),
            ("norm1", dim, None),
            ("norm2", dim, None),
        ):
            shapes[f"blocks.{block}.{name}.weight"] = (out, into) if into else (out,)
            shapes[f"blocks.{block}.{name}.bias"] = (out,)
    return {name: 0.1 * torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}


def vit_features(weights, image):
    """The tokens after the last norm, as ViT (Dosovitskiy et al., 2021) defines them."""

    def linear(name, x):
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(name, x):
        return F.layer_norm(
            x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-6
        )

    kernel, bias = weights["patch_embed.proj.weight"], weights["patch_embed.proj.bias"]
    patches = F.conv2d(image, kernel, bias, stride=kernel.shape[-1]).flatten(2).mT
    tokens = [weights[name] for name in ("cls_token", "dist_token") if name in weights]
    x = torch.cat([*(token.expand(len(image), -1, -1) for token in tokens), patches], 1)
    x = x + weights["pos_embed"]
    for block in range(2):
        name = f"blocks.{block}"
        q, k, v = linear(f"{name}.attn.qkv", norm(f"{name}.norm1", x)).chunk(3, -1)  # one head
        x = x + linear(f"{name}.attn.proj", F.scaled_dot_product_attention(q, k, v))
        hidden = F.gelu(linear(f"{name}.mlp.fc1", norm(f"{name}.norm2", x)))
        x = x + linear(f"{name}.mlp.fc2", hidden)
    return norm("norm", x)


@pytest.mark.parametrize("tokens", [("cls_token",), ("cls_token", "dist_token")])
@torch.inference_mode()
def test_encoder_equals_the_vit_on_grey_images(tokens):
    weights = vit_weights(tokens=tokens)
    encoder = from_reference(weights, "vit")
    assert isinstance(encoder, GridViT) and not encoder.training
    spectrograms = torch.randn(2, 32, 32, dtype=torch.float64)  # [clips, frames, mels]
    features, _ = encoder.forward_features(spectrograms)
    images = spectrograms.mT[:, None].expand(-1, 3, -1, -1)
    expected = vit_features(weights, images)
    torch.testing.assert_close(features.unflatten(0, (2, -1)), expected, rtol=0, atol=1e-10)


def test_elastic_ast_as_the_original_begins(golden):
    fixture = golden("elastic_init_vit_t1024")
    read = ("patch_embed", "pos_embed", "cls_token", ".attn.")
    weights = {
        key: formula_weight(key, shape) if any(part in key for part in read) else torch.zeros(shape)
        for key, shape in fixture.entry["state_dict"]
    }
    model = ElasticAST(527, max_time_patches=64)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.start_from(from_reference(weights, "vit"))

    probe = torch.from_numpy(50 * formula("probe", 768))
    for name in ("time", "freq"):
        table = getattr(model.positions, name).detach()
        fixture.check(f"pos_embed_{name}_ch8", table[:, :8])
        stored = f"pos_embed_{name}_probe"
        atol = fixture.entry["arrays"][stored]["suggested_atol"]
        expected = torch.from_numpy(fixture.arrays[stored])
        torch.testing.assert_close(table.double() @ probe, expected, rtol=0, atol=atol)
    pool = model.pool
    for name, value in {
        "patch_embed.0.weight_row4": model.patch_embed.proj.weight[:4],
        "patch_embed.0.bias": model.patch_embed.proj.bias,
        "attn_pool.to_q.weight_row4": pool.q.weight[:4],
        "attn_pool.to_kv.weight_row4": pool.k.weight[:4],
        "attn_pool.proj.weight_row4": pool.proj.weight[:4],
        "attn_pool.to_q.bias": pool.q.bias,
        "attn_pool.proj.bias": pool.proj.bias,
    }.items():
        fixture.check(name, value.detach())
    value_bias = torch.from_numpy(fixture.arrays["attn_pool.to_kv.bias"][768:])
    atol = fixture.entry["arrays"]["attn_pool.to_kv.bias"]["suggested_atol"]
    torch.testing.assert_close(pool.v.bias.detach(), value_bias, rtol=0, atol=atol)
    qkv = model.trunk.blocks[7].attn.qkv.weight
    assert torch.equal(qkv, weights["blocks.7.attn.qkv.weight"])
    for name in ("pool.query", "norm.weight", "head.weight"):
        assert torch.equal(model.state_dict()[name], before[name])


@pytest.mark.parametrize("side, target", [(14, 128), (14, 1024), (24, 1024)])
def test_ast_as_the_original_begins(golden, side, target):
    fixture = golden(f"ast_pos_deit{side}x{side}_to_12x{(target - 16) // 10 + 1}")
    (_, (_, _, dim)), *_ = fixture.entry["state_dict"]
    weights = vit_weights(dim, 1, side, 16, tokens=("cls_token", "dist_token"))
    weights = {key: value.float() for key, value in weights.items()}
    weights |= fixture.state_dict()
    model = AST(3, input_frames=target, dim=dim, depth=1, num_heads=dim // 64)
    model.start_from(from_reference(weights, "vit"))
    fixture.check("pos_embed_ch8", model.positions.table[:, :8].detach())
    kernel = model.patch_embed.proj.weight[:4].unflatten(1, (1, 16, 16))
    fixture.check("proj_weight_out4", kernel.detach())


@pytest.mark.parametrize("columns", [192, 64, 16])
def test_elastic_ast_from_ssast(columns):
    size = {"dim": 64, "depth": 2, "num_heads": 1}
    source = SSASTPretraining(**size)  # 8 x 64 patches
    model = ElasticAST(3, max_time_patches=columns, **size)
    model.start_from(source)
    image = source.positions.table[2:].detach().T.unflatten(1, (8, 64))[None]
    if columns > 64:
        image = F.interpolate(image, (8, columns), mode="bilinear", align_corners=False)
    else:
        image = image[..., 32 - columns // 2 :][..., :columns]
    torch.testing.assert_close(model.positions.freq.detach(), image[0].mean(2).T)
    torch.testing.assert_close(model.positions.time.detach(), image[0].mean(1).T)
    trunk = source.trunk.state_dict()
    assert all(torch.equal(value, trunk[name]) for name, value in model.trunk.state_dict().items())
    value = torch.stack([block.attn.qkv.weight[128:] for block in source.trunk.blocks]).mean(0)
    torch.testing.assert_close(model.pool.v.weight, value / 6)


def test_mean_pooling_has_nothing_to_start():
    size = {"dim": 64, "depth": 1, "num_heads": 1}
    model = ElasticAST(3, pool="mean", **size)
    model.start_from(SSASTPretraining(**size))


def test_elastic_ast_from_another():
    size = {"dim": 32, "depth": 1, "num_heads": 1}
    source, model = ElasticAST(3, **size), ElasticAST(5, **size)
    model.start_from(source)
    clip = torch.randn(1, 70, 128)
    expected = source.pool(source.forward_features(clip)[0], source.geometry.grid([70]).segments)
    found = model.pool(model.forward_features(clip)[0], model.geometry.grid([70]).segments)
    assert torch.equal(found, expected)
    with pytest.raises(ValueError, match=r"positions\.time is not as in the pre-trained"):
        ElasticAST(5, max_time_patches=8, **size).start_from(source)
    with pytest.raises(ValueError, match="another attention_scale"):
        ElasticAST(5, attention_scale=1.0, **size).start_from(source)


def test_what_does_not_fit_says_so():
    encoder = from_reference(vit_weights(), "vit").float()
    size = {"dim": 64, "depth": 2, "num_heads": 1, "patch_size": (8, 8)}
    with pytest.raises(ValueError, match=r"patch_size \(8, 4\) differs"):
        ElasticAST(3, **size | {"patch_size": (8, 4)}).start_from(encoder)
    with pytest.raises(ValueError, match=r"trunk\.blocks\.2.* same dim, depth and num_heads"):
        ElasticAST(3, **size | {"depth": 3}).start_from(encoder)
    with pytest.raises(ValueError, match="has 1 class tokens, this one 2"):
        AST(3, stride=(8, 8), **size).start_from(encoder)
    AST(3, stride=(8, 8), distilled=False, **size).start_from(encoder)
    with pytest.raises(ValueError, match="starts from a ViT, an AST.* not from Linear"):
        ElasticAST(3, **size).start_from(torch.nn.Linear(2, 2))
    wide = vit_weights() | {"pos_embed": torch.zeros(1, 13, 64)}
    with pytest.raises(ValueError, match="has 12 patches, but .* square images"):
        from_reference(wide, "vit")
    with pytest.raises(ValueError, match="is it of the vit family"):
        from_reference({"patch_embed.proj.weight": torch.zeros(8, 3, 4, 4)}, "vit")
