"""Window attention as a module: against textbook attention of each window, and published models."""

import copy
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastast.nn import ContinuousPositionBias, MelFilterbank, WindowAttention
from fastast.ops import WindowBudget, WindowGrids
from tests.testing import formula, formula_input

HEADS, DIM, WINDOW = 3, 24, 4
SIZES = [(5, 9), (0, 2), (8, 8), (1, 3)]
GRIDS = WindowGrids.from_sizes(SIZES, WINDOW, 2, WindowBudget(150, 40))
USED = 5 * 9 + 8 * 8 + 3
MODULES = {
    "swin": lambda: WindowAttention(DIM, HEADS, WINDOW),
    "swin-v2": lambda: WindowAttention(
        DIM, HEADS, cosine=True, meta_mlp=ContinuousPositionBias(HEADS, WINDOW, hidden=16)
    ),
}
every_module = pytest.mark.parametrize("build", MODULES.values(), ids=MODULES)


def randomised(module, dtype=torch.float64):
    """The module with weights large enough to matter, biases included."""
    torch.manual_seed(1)
    for name, parameter in module.named_parameters():
        nn.init.normal_(parameter, std=DIM**-0.5)
        if name == "tau":  # one of them below its bound
            parameter.data = torch.linspace(0.001, 0.5, HEADS)
    return module.to(dtype)


def stream(dtype=torch.float64):
    torch.manual_seed(0)
    return torch.randn(150, DIM, dtype=dtype, requires_grad=True)


def textbook(module, x):
    """Multi-head attention of one window after the other, with the bias as an additive mask."""
    out = x.new_zeros(x.shape)
    for row, pitch, height, width in GRIDS.host_windows.tolist():
        if not height:
            continue
        y, x_ = np.mgrid[:height, :width].reshape(2, -1)
        tokens = x[row + y * pitch + x_]
        qkv = F.linear(tokens, module.qkv.weight, module.qkv.bias)
        q, k, v = qkv.unflatten(1, (3, HEADS, -1)).permute(1, 2, 0, 3)
        dy, dx = torch.tensor(y[:, None] - y), torch.tensor(x_[:, None] - x_)
        scale = (DIM // HEADS) ** -0.5
        if module.meta_mlp is None:
            index = (dy + WINDOW - 1) * (2 * WINDOW - 1) + dx + WINDOW - 1
            bias = module.relative_position_bias_table[index].permute(2, 0, 1)
        else:
            offsets = torch.stack([dy, dx], -1).to(x.dtype)
            offsets = offsets.sign() * (1 + offsets.abs()).log()
            bias = module.meta_mlp.fc2(module.meta_mlp.fc1(offsets).relu()).permute(2, 0, 1)
        if module.tau is not None:
            q = F.normalize(q, dim=-1) / module.tau.clamp(min=0.01)[:, None, None]
            k, scale = F.normalize(k, dim=-1), 1.0
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
        out[row + y * pitch + x_] = mixed.transpose(0, 1).flatten(1)
    return F.linear(out, module.proj.weight, module.proj.bias)


@every_module
def test_is_multi_head_attention_of_each_window(build):
    module, x = randomised(build()), stream()
    named = {"x": x, **dict(module.named_parameters())}
    actual, expected = module(x, GRIDS), textbook(module, x)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)
    weights = torch.randn_like(actual)
    grads = [
        dict(zip(named, torch.autograd.grad((weights * y).sum(), named.values()), strict=True))
        for y in (actual, expected)
    ]
    torch.testing.assert_close(*grads, rtol=0, atol=1e-10)
    assert torch.equal(actual[USED:], module.proj.bias.expand_as(actual[USED:]))


@every_module
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(build, dtype):
    """In bfloat16 under autocast, from either input dtype, with gradients in float32."""
    module, x = randomised(build(), torch.float32), stream(torch.float32)
    if module.tau is not None:
        module.tau.data.fill_(0.5)  # cosines divided by 0.01 would magnify every rounding
    named = {"x": x, **dict(module.named_parameters())}
    expected = module(x, GRIDS)
    weights = torch.randn_like(expected)
    expected_grads = torch.autograd.grad((weights * expected).sum(), named.values())
    with torch.autocast("cpu", torch.bfloat16):
        actual = module(x.to(dtype), GRIDS)
    assert actual.dtype == torch.bfloat16
    grads = torch.autograd.grad((weights * actual).sum(), named.values())
    assert (actual - expected).norm() <= 0.02 * expected.norm()
    for name, grad, other in zip(named, grads, expected_grads, strict=True):
        assert grad.dtype == torch.float32
        if name != "meta_mlp.fc2.bias":  # it shifts all scores alike: its gradient is rounding
            assert (grad - other).norm() <= 0.02 * other.norm(), name


def test_wrong_heads_say_so():
    with pytest.raises(ValueError, match=r"dim \(24\) must be a multiple of num_heads \(5\)"):
        WindowAttention(DIM, 5)


def test_a_bias_of_another_window_says_so():
    with pytest.raises(ValueError, match=r"bias_table must be \[3, 49\].* got \[3, 225\]"):
        WindowAttention(DIM, HEADS)(stream(torch.float32), GRIDS)


def test_state_dicts_are_those_of_swin_and_audio_mae():
    linear = {
        "qkv.weight": (72, 24),
        "qkv.bias": (72,),
        "proj.weight": (24, 24),
        "proj.bias": (24,),
    }
    expected = {
        "swin": linear | {"relative_position_bias_table": (49, 3)},
        "swin-v2": linear
        | {
            "tau": (3,),
            "meta_mlp.fc1.weight": (16, 2),
            "meta_mlp.fc1.bias": (16,),
            "meta_mlp.fc2.weight": (3, 16),
            "meta_mlp.fc2.bias": (3,),
        },
    }
    for name, build in MODULES.items():
        shapes = {key: tuple(x.shape) for key, x in build().state_dict().items()}
        assert shapes == expected[name]


def test_dropout_of_the_continuous_bias():
    bias = ContinuousPositionBias(HEADS, WINDOW, dropout=0.5)
    bias.fc2.bias.data += 1
    assert bias().shape == (HEADS, 49)
    share = (bias() == 0).float().mean()
    assert 0.3 < share < 0.7
    assert (bias.eval()() != 0).all()


# One compilation for ragged batches ------------------------------------------------------------


@every_module
def test_compiles_once(build):
    module = randomised(build(), torch.float32)
    budget, random = WindowBudget(200, 60), np.random.default_rng(0)
    torch.compiler.reset()
    compiled = torch.compile(copy.deepcopy(module), fullgraph=True, backend="aot_eager")
    for index in range(10):
        sizes = random.integers(0, 9, (random.integers(1, 4), 2))
        grids = WindowGrids.from_sizes(sizes, WINDOW, 2, budget)
        x = torch.randn(200, DIM)
        with torch._dynamo.config.patch(error_on_recompile=index > 0):
            torch.testing.assert_close(compiled(x, grids), module(x, grids))
    torch.compiler.reset()


# Published models ------------------------------------------------------------------------------


class Published:
    """A stored run of an original implementation, and the weights that it ran with."""

    def __init__(self, shared_dir, name):
        folder = shared_dir / "fixtures" / "ssl_family"
        index = json.loads((folder / "fixtures.json").read_text())
        self.case = {case["name"]: case for case in index["cases"]}[name]
        self.arrays = np.load(folder / self.case["file"])
        if "state_dict" in self.case:
            self.tensors = index["state_dicts"][self.case["state_dict"]]["tensors"]
        else:
            self.tensors = self.case["state_dict_keys"]["tensors"]

    def weights(self, prefix):
        """The float32 tensors whose names begin with ``prefix``, which is taken off."""
        found = {}
        for key, entry in self.tensors.items():
            key = key.removeprefix("sed_model.")
            if key.startswith(prefix) and entry["fill"] != "kept":
                value = formula(key, int(np.prod(entry["shape"])))
                value = {"v": value, "1+v": 1 + value, "1+|v|": 1 + abs(value)}[entry["fill"]]
                value = value.astype(np.float32).reshape(entry["shape"])
                found[key.removeprefix(prefix)] = torch.from_numpy(value)
        return found

    def close(self, name, value):
        entry = self.case["arrays"][name]
        stored = torch.from_numpy(self.arrays[name])
        torch.testing.assert_close(
            value.float(),
            stored,
            rtol=entry["rtol"],
            atol=entry["atol"],
            msg=lambda m: f"{name} {m}",
        )

    def check(self, name, tokens):
        """``tokens [batch, length, dim]`` against what is stored of them."""
        dim = tokens.shape[-1]
        probe = torch.from_numpy(formula("probe", dim) * 50 / dim**0.5)
        self.close(f"{name}_first", tokens[:, :8])
        self.close(f"{name}_mean", tokens.mean(-1))
        self.close(f"{name}_probe", tokens.double() @ probe)
        if f"{name}_std" in self.arrays:
            self.close(f"{name}_std", tokens.std(-1, correction=0))


def linear(w, name, x):
    return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def norm(w, name, x, eps=1e-5):
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)


def mlp(w, x):
    return linear(w, "mlp.fc2", F.gelu(linear(w, "mlp.fc1", x)))


def loaded(module, w):
    module.load_state_dict({k.removeprefix("attn."): v for k, v in w.items() if k[:5] == "attn."})
    return module.eval()


def swin_block(w, x, heads, size, shift):
    grids = WindowGrids.from_sizes([(size, size)], 8, shift)
    attention = loaded(WindowAttention(x.shape[-1], heads, 8), w)
    x = x + attention(norm(w, "norm1", x[0]), grids)
    return x + mlp(w, norm(w, "norm2", x))


@torch.no_grad()
def test_a_block_of_hts_at(shared_dir):
    published = Published(shared_dir, "htsat_block_stage0_plain")
    x = swin_block(
        published.weights("layers.0.blocks.0."), formula_input("input", (1, 4096, 96)), 4, 64, 0
    )
    published.check("out", x)
    published.close("out_last4", x[:, -4:])


@torch.no_grad()
def test_all_of_hts_at(shared_dir):
    """Every stage, shifted blocks included, from the waveform on."""
    published = Published(shared_dir, "htsat_audioset_1024frames")
    samples = published.case["inputs"]["shape"][1]
    wave = formula("wave", samples) * 5
    wave += 0.3 * np.sin(2 * np.pi * 440 * np.arange(samples) / 32000)
    mel = MelFilterbank(preset="htsat")([torch.from_numpy(wave).float()]).frames  # [1024, 64]
    w = published.weights("")
    bn = (w[f"bn0.{name}"] for name in ("running_mean", "running_var", "weight", "bias"))
    mel = F.batch_norm(mel, *bn, eps=1e-5)
    image = mel.unflatten(0, (4, 256)).transpose(1, 2).flatten(0, 1)  # four stretches of time
    x = F.conv2d(image[None, None], w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], 4)
    x = norm(w, "patch_embed.norm", x.flatten(2).transpose(1, 2))
    published.check("patch_embed", x)
    for stage, (depth, heads, size) in enumerate([(2, 4, 64), (2, 8, 32), (6, 16, 16), (2, 32, 8)]):
        for block in range(depth):
            prefix = f"layers.{stage}.blocks.{block}."
            x = swin_block(published.weights(prefix), x, heads, size, 4 * (block % 2))
        if stage < 3:
            x = x.unflatten(1, (size // 2, 2, size // 2, 2)).permute(0, 1, 3, 4, 2, 5).flatten(3)
            x = norm(w, f"layers.{stage}.downsample.norm", x.flatten(1, 2))
            x = linear(w, f"layers.{stage}.downsample.reduction", x)
        published.check(f"stage{stage}", x)


def sincos(dim):
    """Audio-MAE's table: the coordinates of token k are k mod 64 and k div 64."""
    k = torch.arange(512, dtype=torch.float64)
    frequency = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angles = [place[:, None] * frequency for place in (k % 64, k // 64)]
    table = torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], 1)
    return F.pad(table, (0, 0, 1, 0)).float()


@pytest.mark.slow
@torch.no_grad()
def test_the_decoder_of_audio_mae(shared_dir):
    """Cosine scores, continuous bias, shifts of (2, 0); its encoder, in plain PyTorch, before."""
    published = Published(shared_dir, "mae_pretrain_vitb_swin")
    image = formula_input("input", (2, 1, 1024, 128))
    w = {k: v for k, v in published.weights("").items() if "locks." not in k}
    x = F.conv2d(image, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], 16)
    position = sincos(768)
    x = x.flatten(2).transpose(1, 2) + position[1:]
    order = torch.from_numpy(published.arrays["noise"]).argsort(1)
    x = torch.stack([tokens[keep] for tokens, keep in zip(x, order[:, :102], strict=True)])
    x = torch.cat([(w["cls_token"] + position[0]).expand(2, 1, -1), x], 1)
    for index in range(12):
        b = published.weights(f"blocks.{index}.")
        q, k, v = (
            linear(b, "attn.qkv", norm(b, "norm1", x, 1e-6)).unflatten(2, (3, 12, 64)).unbind(2)
        )
        mixed = F.scaled_dot_product_attention(*(y.transpose(1, 2) for y in (q, k, v)))
        x = x + linear(b, "attn.proj", mixed.transpose(1, 2).flatten(2))
        x = x + mlp(b, norm(b, "norm2", x, 1e-6))
        if index == 0:
            published.check("enc_block0", x)
    x = norm(w, "norm", x, 1e-6)
    published.check("latent", x)

    x = linear(w, "decoder_embed", x)
    full = torch.cat([x[:, 1:], w["mask_token"].expand(2, 410, -1)], 1)
    restore = torch.from_numpy(published.arrays["ids_restore"]).long()
    full = torch.stack([tokens[place] for tokens, place in zip(full, restore, strict=True)])
    x = (full + sincos(512)[1:]).flatten(0, 1)
    for index in range(16):
        b = published.weights(f"decoder_blocks.{index}.")
        grids = WindowGrids.from_sizes([(64, 8)] * 2, 4, (2 * (index % 2), 0))
        bias = ContinuousPositionBias(16, 4, dropout=0.1)
        attention = loaded(WindowAttention(512, 16, cosine=True, meta_mlp=bias), b)
        x = x + norm(b, "norm1", attention(x, grids), 1e-6)
        x = x + norm(b, "norm2", mlp(b, x), 1e-6)
        if index < 2:
            published.check(f"dec_block{index}", x.unflatten(0, (2, 512)))
    published.check("dec_blocks_out", x.unflatten(0, (2, 512)))
