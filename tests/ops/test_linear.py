"""linear: the native kernel against float64 and torch, and the same bits in any company."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from vtts_rt.ops import native
from vtts_rt.ops.linear import linear, linear_ref
from vtts_rt.ops.native import MAX_ROWS

_C = pytest.importorskip("vtts_rt._C", reason="built without the native extension")
ISAS = [isa for isa in ("scalar", "avx2", "avx512", "neon") if _C.isa_supported(isa)]
SHAPES = [(1, 1), (5, 3), (3, 16), (7, 24), (64, 31), (100, 513), (1000, 200)]  # (O, C)


def on_isa(x: Tensor, weight: Tensor, bias: Tensor | None, isa: str, num_threads: int) -> Tensor:
    """The native kernel on a given instruction set, which the public function does not offer."""
    guard = 8
    out = torch.full((x.shape[0] * weight.shape[0] + guard,), 12345.0)
    _C.linear(
        x.data_ptr(),
        x.stride(0),
        weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(),
        *x.shape,
        weight.shape[0],
        num_threads,
        isa,
    )
    assert bool((out[-guard:] == 12345.0).all()), "nothing is written behind the result"
    return out[:-guard].view(x.shape[0], weight.shape[0])


def within_twice_the_error_of_torch(out: Tensor, x: Tensor, w: Tensor, bias: Tensor | None) -> None:
    exact = linear_ref(x, w, bias)
    allowed = 2 * (F.linear(x, w, bias).double() - exact).abs().max()
    ulp = torch.finfo(torch.float32).eps * exact.abs().max()
    assert (out.double() - exact).abs().max() <= allowed + ulp


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_every_instruction_set_is_as_exact_as_torch(
    isa: str, shape: tuple[int, int], with_bias: bool
) -> None:
    weight = torch.randn(shape)
    bias = torch.randn(shape[0]) if with_bias else None
    for rows in range(1, MAX_ROWS + 2):
        x = torch.randn(rows, 2 * shape[1])[:, : shape[1]]  # rows that are not adjacent
        out = on_isa(x, weight, bias, isa, num_threads=1)
        within_twice_the_error_of_torch(out, x, weight, bias)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    "shape", [(17, 1, 1), (29, 5, 37), (70, 33, 16), (100, 64, 1030), (41, 2, 0), (4100, 3, 9)]
)  # (N, O, C): more channels than go through at once, none, and more rows
@pytest.mark.parametrize("with_bias", [False, True])
def test_many_rows_are_as_exact_as_torch(
    isa: str, shape: tuple[int, int, int], with_bias: bool
) -> None:
    num_rows, num_outputs, num_channels = shape
    weight = torch.randn(num_outputs, num_channels)
    bias = torch.randn(num_outputs) if with_bias else None
    x = torch.randn(num_rows, num_channels + 3)[:, :num_channels]
    for num_threads in (1, 2):
        out = on_isa(x, weight, bias, isa, num_threads)
        within_twice_the_error_of_torch(out, x, weight, bias)


@pytest.mark.parametrize("isa", ISAS)
def test_among_many_rows_a_row_has_the_same_bits_in_any_company(isa: str) -> None:
    x, weight, bias = torch.randn(150, 1117), torch.randn(75, 1117), torch.randn(75)
    together = on_isa(x, weight, bias, isa, num_threads=2)
    for first, last in ((0, 17), (3, 61), (111, 150)):
        part = on_isa(x[first:last], weight, bias, isa, num_threads=1)
        assert torch.equal(part, together[first:last])


def test_limits_are_those_of_the_core() -> None:
    assert (_C.FEW_ROWS, _C.MAX_HEAD_DIM) == (MAX_ROWS, native.MAX_HEAD_DIM)


@pytest.mark.parametrize("isa", ISAS)
def test_a_row_has_the_same_bits_alone_in_a_batch_and_on_two_threads(isa: str) -> None:
    x, weight, bias = torch.randn(16, 517), torch.randn(600, 517), torch.randn(600)
    together = on_isa(x, weight, bias, isa, num_threads=2)
    for rows in (1, 2, 3, 5, 8):
        assert torch.equal(on_isa(x[:rows], weight, bias, isa, num_threads=1), together[:rows])


@pytest.mark.parametrize("rows", [0, 1, 16, 17, 200])
@pytest.mark.parametrize("backend", ["auto", "cpu"])
def test_the_public_function_takes_any_number_of_rows(rows: int, backend: str) -> None:
    x, weight = torch.randn(rows, 40), torch.randn(30, 40)
    out = linear(x, weight, backend=backend)
    assert out.shape == (rows, 30) and out.dtype == torch.float32
    torch.testing.assert_close(out, F.linear(x, weight), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("refusal", [None, "an Intel processor"])
def test_many_rows_go_where_they_were_measured_to_be_faster(
    refusal: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "tiles_refusal", lambda: refusal)
    x, weight = torch.randn(MAX_ROWS + 1, 300), torch.randn(40, 300)
    expected = linear(x, weight, backend="torch" if refusal else "cpu")
    assert torch.equal(linear(x, weight), expected)
    assert torch.equal(linear(x[1:], weight), linear(x[1:], weight, backend="cpu"))


def test_a_backend_asked_for_by_the_environment_runs_for_any_number_of_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(native, "tiles_refusal", lambda: "an Intel processor")
    monkeypatch.setenv("VTTS_RT_BACKEND", "linear=cpu")
    x, weight = torch.randn(100, 300), torch.randn(40, 300)
    assert torch.equal(linear(x, weight), linear(x, weight, backend="cpu"))


def test_what_the_kernel_cannot_take_goes_to_torch() -> None:
    weight, bias = torch.randn(6, 5), torch.randn(6)
    x = torch.randn(2, 5)
    assert torch.equal(linear(x.double(), weight.double()), F.linear(x.double(), weight.double()))
    by_columns = weight.T.contiguous().T
    assert torch.equal(linear(x, by_columns, bias), F.linear(x, by_columns, bias))
    assert linear(torch.randn(2, 3, 5), weight).shape == (2, 3, 6)
    needs_gradient = weight.clone().requires_grad_()
    linear(x, needs_gradient).sum().backward()
    assert needs_gradient.grad is not None
    with torch.no_grad():
        assert not linear(x, needs_gradient, backend="cpu").requires_grad


def test_strides_of_x_are_read_in_place_or_copied() -> None:
    weight = torch.randn(9, 7)
    for x in (torch.randn(7, 4).T, torch.randn(8, 7)[::2], torch.randn(1, 7).expand(3, 7)):
        torch.testing.assert_close(
            linear(x, weight, backend="cpu"), F.linear(x, weight), rtol=1e-5, atol=1e-5
        )


def test_bad_arguments_are_named() -> None:
    x, weight = torch.randn(2, 5), torch.randn(6, 5)
    with pytest.raises(ValueError, match=r"linear: x must be \(..., C\) for weight \(6, 5\), got"):
        linear(x[:, :4], weight)
    with pytest.raises(ValueError, match=r"linear: bias must be \(6,\), got \(5,\)"):
        linear(x, weight, torch.randn(5))
    with pytest.raises(ValueError, match="what backend 'cpu' takes, got 'a tensor that is not fl"):
        linear(x.double(), weight.double(), backend="cpu")
    with pytest.raises(ValueError, match="got 'a tensor that needs a gradient'"):
        linear(x, weight.requires_grad_(), backend="cpu")
    with pytest.raises(ValueError, match="linear: isa must be one of"):
        on_isa(x, weight, None, "sse9", 1)


FORK = """
import os
import torch
from vtts_rt.ops.linear import linear

torch.set_num_threads(2)
x, weight = torch.randn(2, 256), torch.randn(4096, 256)
expected = linear(x, weight, backend="torch")  # torch's threads are there, the kernel was not asked
child = os.fork()
if child == 0:
    difference = linear(x, weight, backend="cpu").sub_(expected)
    os._exit(0 if max(map(abs, difference.flatten().tolist())) < 1e-3 else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_forked_before_the_first_native_call_does_not_wait_for_its_parents_threads() -> (
    None
):
    subprocess.run([sys.executable, "-c", FORK], check=True, timeout=120)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_has_threads_of_its_own() -> None:
    x, weight = torch.randn(2, 256), torch.randn(4096, 256)
    expected = on_isa(x, weight, None, "auto", num_threads=2)
    child = os.fork()
    if child == 0:
        same = torch.equal(on_isa(x, weight, None, "auto", num_threads=2), expected)
        os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
