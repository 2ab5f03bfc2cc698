"""Resized kernels and tables against the stock interpolation, and the originals' numbers."""

import pytest
import torch
import torch.nn.functional as F

from fastast.tokens import resize_patch_kernel, resize_positions
from tests.testing import Golden, formula

SIZES = [(4, 4), (8, 8), (5, 11), (16, 64), (16, 16), (13, 3), (1, 1), (48, 40)]


@pytest.fixture
def golden(shared_dir):
    return lambda name: Golden(shared_dir / "fixtures" / "ast_family", name)


def kernel(dtype=torch.float64, height=16, width=16):
    return torch.randn(6, 1, height, width, dtype=dtype, generator=torch.Generator().manual_seed(0))


def interpolated(image, size, antialias):
    return F.interpolate(image, size=size, mode="bilinear", antialias=antialias)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_bilinear_is_antialiased_interpolation(size):
    weight = kernel()
    expected = interpolated(weight, size, antialias=True)
    torch.testing.assert_close(resize_patch_kernel(weight, size), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_pi_is_the_pseudo_inverse_of_the_whole_operator(size):
    weight = kernel()
    basis = torch.eye(256, dtype=torch.float64).view(256, 1, 16, 16)
    operator = interpolated(basis, size, antialias=False).flatten(1).T  # [new, old]
    expected = weight.flatten(1) @ torch.linalg.pinv(operator.T).T
    actual = resize_patch_kernel(weight, size, "pi")
    torch.testing.assert_close(actual.flatten(1), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [(16, 64), (32, 24), (17, 16)], ids=str)
def test_pi_keeps_the_responses_of_a_kernel_that_grows(size):
    weight, patch = kernel(), kernel(height=16, width=16).flip(0)
    grown = interpolated(patch, size, antialias=False)
    actual = (resize_patch_kernel(weight, size, "pi") * grown).sum((1, 2, 3))
    torch.testing.assert_close(actual, (weight * patch).sum((1, 2, 3)), rtol=0, atol=1e-11)


@pytest.mark.parametrize("method", ["bilinear", "pi"])
def test_gradients_flow_to_the_kernel(method):
    weight = torch.randn(2, 1, 5, 4, dtype=torch.float64, requires_grad=True)
    for size in ((3, 6), (5, 2)):
        assert torch.autograd.gradcheck(lambda w, s=size: resize_patch_kernel(w, s, method), weight)


@pytest.mark.parametrize("kind", ["bilinear", "sampled", "pi"])
def test_the_operator_of_the_matrices(kind):
    like = torch.zeros(1, dtype=torch.float64)
    torch.library.opcheck(torch.ops.fastast.resize_matrix.default, (like, 7, 5, kind))


def test_a_kernel_of_its_own_size_stays_as_it_is():
    weight = kernel()
    assert resize_patch_kernel(weight, (16, 16), "pi") is weight


def test_full_precision_under_autocast_and_training_after_inference():
    weight = kernel(torch.float32).requires_grad_()
    with torch.inference_mode():
        first = resize_patch_kernel(weight, (9, 23), "pi")
    with torch.autocast("cpu", torch.bfloat16):
        again = resize_patch_kernel(weight, (9, 23), "pi")
    assert torch.equal(first, again) and again.dtype == torch.float32
    again.sum().backward()
    assert weight.grad.isfinite().all()


@pytest.mark.parametrize("method, name", [("pi", "pi"), ("bilinear", "bl")])
def test_kernels_of_the_original(golden, method, name):
    fixture = golden("flexi_resize_16x16")
    (weight,) = fixture.state_dict().values()
    for height, width in fixture.entry["constructor"]["new_sizes"]:
        resized = resize_patch_kernel(weight, (height, width), method)
        fixture.check(f"{name}_{height}x{width}", resized)


@pytest.mark.parametrize(
    "name, grid",
    [
        ("ast_pos_as12x101_to_12x12", (12, 101)),
        ("ast_pos_as12x101_to_12x50", (12, 101)),
        ("ast_pos_as12x101_to_12x149", (12, 101)),
        ("ast_pos_deit14x14_to_12x12", (14, 14)),
        ("ast_pos_deit14x14_to_12x101", (14, 14)),
        ("ast_pos_deit24x24_to_12x101", (24, 24)),
    ],
)
def test_tables_of_the_original_ast(golden, name, grid):
    fixture = golden(name)
    table = next(x for key, x in fixture.state_dict().items() if key.endswith("pos_embed"))[0]
    size = tuple(fixture.arrays["grid"].tolist())
    resized = resize_positions(table, grid, size, prefix=2, shrink="cut")
    fixture.check("pos_embed_ch8", resized[:, :8])
    wide = resized.double()
    probe = torch.from_numpy(50 * formula("probe", table.shape[1]))
    for part, value in {
        "mean": wide.mean(1),
        "std": wide.std(1, correction=0),
        "probe": wide @ probe,
    }.items():
        fixture.check_summary(f"pos_embed_{part}", value)


@pytest.mark.parametrize("shrink", ["bilinear", "antialias"])
@pytest.mark.parametrize("size", [(12, 101), (3, 101), (12, 7), (5, 9), (30, 200), (1, 1)], ids=str)
def test_tables_are_interpolated(shrink, size):
    table = torch.randn(1 + 12 * 101, 5, dtype=torch.float64)
    image = table[1:].unflatten(0, (12, 101)).permute(2, 0, 1)[None]
    image = interpolated(image, size, antialias=shrink == "antialias")
    expected = torch.cat([table[:1], image[0].permute(1, 2, 0).flatten(0, 1)])
    actual = resize_positions(table, (12, 101), size, prefix=1, shrink=shrink)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-13)


def test_gradients_flow_to_the_table():
    table = torch.randn(2 + 12, 3, dtype=torch.float64, requires_grad=True)
    for shrink in ("bilinear", "antialias", "cut"):
        assert torch.autograd.gradcheck(
            lambda x, s=shrink: resize_positions(x, (3, 4), (5, 2), prefix=2, shrink=s), table
        )


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"method": "nearest"}, "method must be one of"),
        ({"size": (0, 4)}, "size must be positive"),
        ({"weight": torch.zeros(4)}, "unflatten it"),
    ],
)
def test_wrong_kernel_arguments_say_so(arguments, message):
    with pytest.raises(ValueError, match=message):
        resize_patch_kernel(**({"weight": torch.zeros(4, 1, 8, 8), "size": (4, 4)} | arguments))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"shrink": "crop"}, "shrink must be"),
        ({"prefix": 1}, r"table must be \[1 \+ 3 \* 4, dim\]"),
        ({"size": (3, 0)}, "size must be positive"),
    ],
)
def test_wrong_table_arguments_say_so(arguments, message):
    given = {"table": torch.zeros(12, 5), "grid": (3, 4), "size": (3, 2)} | arguments
    with pytest.raises(ValueError, match=message):
        resize_positions(**given)
