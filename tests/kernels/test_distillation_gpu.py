"""The distillation kernels, compiled, through the public function."""

import pytest
import torch

from fastast.ops import distillation_cross_entropy
from tests.testing import assert_as_accurate, forward_and_gradients

pytestmark = pytest.mark.gpu

STUDENT_TEMP, TEACHER_TEMP = 0.1, 0.07


def inputs_of(rows, classes, dtype, scale=1.0):
    """Student, teacher, centre, and a gradient of the loss."""
    torch.manual_seed(0)
    student, teacher = (scale * torch.randn(rows, classes, device="cuda") for _ in range(2))
    center = 0.1 * torch.randn(classes, device="cuda")
    return (student.to(dtype), teacher.to(dtype), center), torch.randn(rows, device="cuda")


def run(inputs, grad, **options):
    """The loss and the student's gradient."""
    student, teacher, center = inputs

    def loss(student):
        return distillation_cross_entropy(
            student, teacher, center, STUDENT_TEMP, TEACHER_TEMP, **options
        )

    return forward_and_gradients(loss, [student], grad)


@pytest.mark.parametrize("scale", [1.0, 1e4], ids=["usual", "huge"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("classes", [1, 7, 100, 527, 1000, 1024, 2048, 4096, 8192, 65536])
@pytest.mark.parametrize("rows", [64, 2999])
def test_as_accurate_as_eager(rows, classes, dtype, scale):
    if rows * classes > 2**25:
        pytest.skip("the same in fewer rows")
    inputs, grad = inputs_of(rows, classes, dtype, scale)
    eager = run(inputs, grad, backend="reference")
    truth = run([x.double() for x in inputs], grad.double(), backend="reference")
    assert_as_accurate(run(inputs, grad), eager, truth)


def test_no_rows():
    inputs, grad = inputs_of(0, 1024, torch.bfloat16)
    loss, dstudent = run(inputs, grad)
    assert loss.shape == (0,) and dstudent.shape == (0, 1024)


def test_rows_of_a_wider_tensor():
    inputs, grad = inputs_of(300, 1024, torch.bfloat16)
    expected = run(inputs, grad)
    wide = [x.repeat(1, 3)[:, 1024:2048] for x in inputs[:2]]
    found = run((*wide, inputs[2]), grad)
    assert all(map(torch.equal, found, expected))


def test_unused_rows_get_zeros_whatever_they_hold():
    inputs, grad = inputs_of(3000, 1024, torch.bfloat16)
    grad[::3] = 0
    _, expected = run(inputs, grad)
    for x in inputs[:2]:
        x[::3] = torch.nan
    _, dstudent = run(inputs, grad)
    assert torch.equal(dstudent, expected)
    assert (dstudent[::3] == 0).all()


@pytest.mark.parametrize("classes", [1024, 8192, 65536])
def test_deterministic(classes):
    inputs, grad = inputs_of(1500, classes, torch.bfloat16)
    first = run(inputs, grad)
    for _ in range(5):
        assert all(map(torch.equal, first, run(inputs, grad)))


def test_graph_replays_other_logits_and_temperatures():
    (student, teacher, center), grad = inputs_of(5000, 1024, torch.bfloat16)
    student.requires_grad_()
    temp = torch.tensor(0.04, device="cuda")

    def step():
        loss = distillation_cross_entropy(student, teacher, center, STUDENT_TEMP, temp)
        return [loss, *torch.autograd.grad(loss, student, grad)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    for other in (0.05, 0.06, 0.07):
        with torch.no_grad():
            student.normal_()
            teacher.normal_()
            temp.fill_(other)
        graph.replay()
        found = [x.clone() for x in results]
        assert all(map(torch.equal, found, step()))


def test_compiles_once_and_never_waits():
    """Numbers of rows and temperatures change; nothing is compiled again, the host waits for
    nothing."""
    import triton

    torch._dynamo.reset()

    def mean(student, teacher, center, temp):
        return distillation_cross_entropy(student, teacher, center, STUDENT_TEMP, temp).mean()

    compiled = torch.compile(mean, fullgraph=True)
    sizes = [500, 700, 16, 17, 4096, 33, 1000, 15, 19000, 2]
    prepared = [inputs_of(rows, 1024, torch.bfloat16)[0] for rows in sizes]
    temps = torch.linspace(0.04, 0.07, len(sizes), device="cuda").unbind()
    built = []
    for index, ((student, teacher, center), temp) in enumerate(zip(prepared, temps, strict=True)):
        student.requires_grad_()
        warm = index >= 3
        with triton.knobs.compilation.scope():
            triton.knobs.compilation.listener = lambda **event: built.append(event["src"].name)
            if warm:
                torch.cuda.set_sync_debug_mode("error")
                built.clear()
            try:
                with torch._dynamo.config.patch(error_on_recompile=warm):
                    compiled(student, teacher, center, temp).backward()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        assert not (warm and built)


@pytest.mark.parametrize("rows", [15, 16, 17, 1, 2])
def test_any_number_of_rows_is_one_kernel(rows):
    """Numbers that a launcher would specialise on: one, and multiples of 16."""
    import triton

    run(*inputs_of(7, 512, torch.bfloat16))
    built = []
    inputs, grad = inputs_of(rows, 512, torch.bfloat16)
    with triton.knobs.compilation.scope():
        triton.knobs.compilation.listener = lambda **event: built.append(event["src"].name)
        run(inputs, grad)
    assert not [name for name in built if name.startswith("distillation")]


def test_more_elements_than_32_bits_count():
    rows, classes = 2**19 + 40, 8192
    if torch.cuda.mem_get_info()[0] < 7 * rows * classes:
        pytest.skip("needs 28 GiB of GPU memory")
    student = torch.zeros(rows, classes, device="cuda", dtype=torch.bfloat16)
    teacher = torch.zeros_like(student)
    tail = slice(rows - 20, rows)
    student[tail].normal_()
    teacher[tail].normal_()
    center, grad = torch.zeros(classes, device="cuda"), torch.randn(rows, device="cuda")
    found = run((student, teacher, center), grad)
    alone = run((student[tail].clone(), teacher[tail].clone(), center), grad[tail])
    assert all(torch.equal(x[tail], y) for x, y in zip(found, alone, strict=True))
