"""linear: the native kernel against float64 and torch, and the same bits in any batch."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from op_cases import cases
from op_cases.case import error_of
from torch import Tensor
from torch.nn import functional as F

from vtts_rt.ops import native
from vtts_rt.ops.linear import linear, linear_ref, packs, quantize_int8
from vtts_rt.ops.packed import PANEL, Matrix, pack, unpack
from vtts_rt.ops.quantized import dequantize

_C = pytest.importorskip("vtts_rt._C", reason="built without the native extension")
ISAS = [
    isa
    for isa in ("scalar", "avx2", "avx512", "avx512_bf16", "amx", "neon")
    if _C.isa_supported(isa)
]
DTYPES = (torch.float32, torch.bfloat16)
# (N, O, C): parts of panels and of vectors, whole ones, more channels than a run of sums has, and
# none.
SHAPES = [
    *((1, 1, 2), (5, 3, 16), (16, 24, 31), (3, 64, 512), (17, 33, 254), (2, 40, 0)),
    *(
        (43, 100, 1030),
        (70, 33, 16),
        (1, 1000, 1030),
        (1, 1000, 200),
        (2, 1000, 128),
        (1100, 5, 40),
    ),
]


def in_place(num_rows: int, num_channels: int, dtype: torch.dtype) -> Tensor:
    """Rows that are not adjacent."""
    return torch.randn(num_rows, 2 * num_channels).to(dtype)[:, :num_channels]


def packed(matrix: Matrix) -> Matrix:
    return matrix._replace(tensor=pack(matrix.tensor))


def matrix_of(num_outputs: int, num_channels: int, kind: torch.dtype) -> Matrix:
    weight = torch.randn(num_outputs, num_channels)
    if kind is torch.int8:
        return Matrix.of(*quantize_int8(weight))
    return Matrix.of(weight.to(kind))


def on_isa(x: Tensor, weight: Matrix, bias: Tensor | None, isa: str, num_threads: int) -> Tensor:
    """The native kernel on a given instruction set, which the public function does not offer."""
    guard = 8
    out = torch.full((x.shape[0] * weight.num_outputs + guard,), torch.nan, dtype=x.dtype)
    _C.linear(
        *(x.data_ptr(), x.stride(0), weight.address, native.address(weight.scale)),
        *(native.address(bias), out.data_ptr(), *x.shape, weight.num_outputs),
        *(native.STORAGE[x.dtype], weight.weight_dtype, weight.packed, num_threads, isa),
    )
    assert bool(out[-guard:].isnan().all()), "nothing is written behind the result"
    return out[:-guard].view(x.shape[0], weight.num_outputs)


def within_twice_the_error_of_torch(
    out: Tensor, x: Tensor, weight: Matrix, bias: Tensor | None
) -> None:
    exact = linear_ref(x, weight, bias)
    dense = weight.plain()
    if weight.scale is not None:
        dense = dequantize(dense, weight.scale, x.dtype)
    allowed = 2 * (F.linear(x, dense, bias).double() - exact).abs().max()
    ulp = torch.finfo(x.dtype).eps * exact.abs().max()
    assert (out.double() - exact).abs().max() <= allowed + ulp


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("of_bytes", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set_is_as_exact_as_torch_packed_or_not(
    isa: str, of_bytes: bool, dtype: torch.dtype
) -> None:
    for num_rows, num_outputs, num_channels in SHAPES:
        if dtype is torch.bfloat16:
            num_channels += num_channels % 2
        plain = matrix_of(num_outputs, num_channels, torch.int8 if of_bytes else dtype)
        x, weight = in_place(num_rows, num_channels, dtype), packed(plain)
        for bias in (None, torch.randn(num_outputs).to(dtype)):
            out = on_isa(x, weight, bias, isa, num_threads=1)
            within_twice_the_error_of_torch(out, x, weight, bias)
            assert torch.equal(on_isa(x, weight, bias, isa, num_threads=2), out)
            if not of_bytes:
                assert torch.equal(on_isa(x, plain, bias, isa, num_threads=2), out)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("of_bytes", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_in_any_batch_and_on_two_threads(
    isa: str, of_bytes: bool, dtype: torch.dtype
) -> None:
    weight = packed(matrix_of(600, 1118, torch.int8 if of_bytes else dtype))
    bias = torch.randn(600).to(dtype)
    x = in_place(150, 1118, dtype)
    together = on_isa(x, weight, bias, isa, num_threads=2)
    for first, last in ((0, 1), (3, 5), (0, 16), (0, 17), (3, 61), (111, 150)):
        part = on_isa(x[first:last], weight, bias, isa, num_threads=1)
        assert torch.equal(part, together[first:last])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_byte_is_taken_for_its_value(isa: str, dtype: torch.dtype) -> None:
    every = torch.arange(-128, 128, dtype=torch.int8)
    for rows in (1, 17):
        weight = packed(Matrix.of(every[:, None].contiguous(), torch.ones(256)))
        out = on_isa(torch.ones(rows, 1, dtype=dtype), weight, None, isa, num_threads=1)
        assert torch.equal(out, every.to(dtype).expand(rows, 256))
        weight = packed(Matrix.of(every.view(2, 128), torch.full((2,), 0.5)))
        out = on_isa(torch.eye(128, dtype=dtype)[:rows], weight, None, isa, num_threads=1)
        assert torch.equal(out, 0.5 * every.view(2, 128)[:, :rows].to(dtype).mT)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_every_case_is_within_rounding_of_the_equation(backend: str) -> None:
    ran = [case for case in cases("linear", "cpu", "check") if case.takes(backend)]
    assert len(ran) == (40 if backend == "cpu" else 72)
    for case in ran:
        error = error_of(case, backend)
        assert error.within, (case.name, case.dtype, error)


@pytest.mark.parametrize("rows", [0, 1, 17, 200])
@pytest.mark.parametrize("backend", ["auto", "cpu"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_public_function_takes_any_number_of_rows(
    rows: int, backend: str, dtype: torch.dtype
) -> None:
    x, plain = torch.randn(rows, 2, 40).to(dtype), torch.randn(30, 40).to(dtype)
    out = linear(x, plain, backend=backend)
    assert out.shape == (rows, 2, 30) and out.dtype is dtype
    rtol, atol = (1e-5, 1e-5) if dtype is torch.float32 else (2e-2, 1e-1)
    torch.testing.assert_close(out, F.linear(x, plain), rtol=rtol, atol=atol)
    assert torch.equal(linear(x, packed(Matrix.of(plain)), backend=backend), out)
    of_bytes = Matrix.of(*quantize_int8(plain))
    out = linear(x, of_bytes, backend=backend)
    torch.testing.assert_close(out, linear(x, of_bytes, backend="torch"), rtol=rtol, atol=atol)
    assert torch.equal(linear(x, packed(of_bytes), backend=backend), out)


def test_limits_are_those_of_the_core() -> None:
    assert (_C.MAX_HEAD_DIM, _C.PANEL) == (native.MAX_HEAD_DIM, PANEL)


def test_what_the_kernel_cannot_take_goes_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = torch.randn(2, 5), torch.randn(6, 5), torch.randn(6)
    assert torch.equal(linear(x.double(), weight.double()), F.linear(x.double(), weight.double()))
    by_columns = weight.T.contiguous().T
    assert torch.equal(linear(x, by_columns, bias), F.linear(x, by_columns, bias))
    odd = x.bfloat16(), weight.bfloat16()  # pairs of channels
    assert torch.equal(linear(*odd), F.linear(*odd))
    panels = pack(weight).bfloat16()  # no pairs: of another type when it was packed
    assert torch.equal(linear(odd[0], Matrix(panels, 6)), F.linear(*odd))
    monkeypatch.setenv("VTTS_RT_BACKEND", "linear=torch")
    assert torch.equal(linear(x, Matrix(pack(weight), 6), bias), F.linear(x, weight, bias))


def test_gradients_reach_rows_and_weights_packed_ones_too() -> None:
    x = torch.randn(3, 4).requires_grad_()
    for dtype in DTYPES:
        plain = torch.randn(7, 4).to(dtype).requires_grad_()
        panels = pack(plain).requires_grad_()
        rows = x.to(dtype)
        linear(rows, plain).square().sum().backward()
        linear(rows, Matrix(panels, 7)).square().sum().backward()
        assert plain.grad is not None and panels.grad is not None
        assert torch.equal(unpack(panels.grad, 7), plain.grad)
        with torch.no_grad():
            assert not linear(rows, Matrix(panels, 7), backend="cpu").requires_grad
    weight8, scale = quantize_int8(torch.randn(6, 4))
    wanted = x.detach().requires_grad_()
    linear(wanted, packed(Matrix.of(weight8, scale))).sum().backward()
    assert wanted.grad is not None
    torch.testing.assert_close(wanted.grad, dequantize(weight8, scale).sum(0).expand(3, 4))


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
        on_isa(x, Matrix.of(weight), None, "sse9", 1)


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (lambda m: m._replace(scale=None), "scale must be given with int8 weights only, got None"),
        (lambda m: m._replace(tensor=m.tensor.float()), "scale must be given with int8 weights"),
        (lambda m: m._replace(scale=m.scale.double()), r"scale must be \(6,\) float32, got \(6, t"),
        (lambda m: m._replace(scale=m.scale[:5]), r"scale must be \(6,\) float32, got \(5, torch"),
        (lambda m: m._replace(num_outputs=7), r"weight must be of 7 outputs, got \(6, 5\)"),
        (lambda m: packed(m)._replace(num_outputs=17), r"weight must be of 17 outputs, got \(1, 5"),
    ],
)
def test_a_matrix_that_is_none_is_named(change: Callable[[Matrix], Matrix], rule: str) -> None:
    matrix = change(Matrix.of(*quantize_int8(torch.randn(6, 5))))
    with pytest.raises(ValueError, match=f"linear: {rule}"):
        linear(torch.randn(2, 5), matrix)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_byte_is_the_nearest(dtype: torch.dtype) -> None:
    weight = (torch.randn(7, 300) * torch.logspace(-4, 3, 7)[:, None]).to(dtype)
    weight8, scale = quantize_int8(weight)
    assert weight8.dtype is torch.int8 and scale.dtype is torch.float32
    assert bool((weight8.short().abs().amax(1) == 127).all())
    off = (dequantize(weight8, scale) - weight.float()).abs()
    assert bool((off <= 0.5001 * scale[:, None]).all())


def test_rows_of_nothing_and_tiny_rows_become_zeros() -> None:
    weight = torch.zeros(3, 4)
    weight[1] = 1e-44
    weight[2, 0] = -3.0
    weight8, scale = quantize_int8(weight)
    assert not weight8[:2].any() and bool(scale.isfinite().all())
    assert weight8[2].tolist() == [-127, 0, 0, 0]
    assert quantize_int8(torch.zeros(2, 0))[0].shape == (2, 0)


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_weights_that_are_not_finite_are_refused(bad: float) -> None:
    weight = torch.ones(2, 2)
    weight[1, 1] = bad
    with pytest.raises(ValueError, match="quantize_int8: weight must be finite"):
        quantize_int8(weight)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int8, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(1, 2), (16, 2), (17, 2), (33, 10), (48, 64), (5, 0)])
def test_packing_moves_values_and_nothing_else(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = torch.randint(-100, 100, shape).to(dtype)
    panels, together = pack(weight), 2 if dtype is torch.bfloat16 else 1
    assert panels.shape == (-(-shape[0] // 16), shape[1] // together, 16, together)
    assert panels.is_contiguous() and panels.dtype is dtype
    matrix = Matrix(panels, shape[0])
    assert matrix.shape == shape and matrix.packed
    plain = matrix.plain()
    assert torch.equal(plain, weight) and plain.is_contiguous()
    index = torch.tensor([shape[0] - 1, 0])
    assert torch.equal(matrix.rows(index), weight[index])
    for o in range(shape[0]):
        for c in range(min(2, shape[1])):
            assert panels[o // 16, c // together, o % 16, c % together] == weight[o, c]
    assert int(panels.ne(0).sum()) == int(weight.ne(0).sum())  # filled up with zeros


def test_what_products_gain_from_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype in DTYPES:
        matrix = Matrix.of(torch.randn(6, 4).to(dtype))
        assert packs(matrix) and not packs(packed(matrix))
    assert packs(Matrix.of(*quantize_int8(torch.randn(6, 5))))
    odd = torch.randn(6, 5).bfloat16()
    for weight in (
        torch.randn(6, 4).double(),
        torch.randn(4, 6).T,
        odd,
        torch.ones(6, 4).to("meta"),
    ):
        assert not packs(Matrix.of(weight))
    with pytest.raises(ValueError, match=r"pack: weight must be \(O, C\) with C a multiple of 2"):
        pack(odd)
    monkeypatch.setenv("VTTS_RT_BACKEND", "linear=torch")
    assert not packs(Matrix.of(torch.randn(6, 4)))


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
    x, weight = torch.randn(2, 256), Matrix.of(torch.randn(4096, 256))
    expected = on_isa(x, weight, None, "auto", num_threads=2)
    child = os.fork()
    if child == 0:
        same = torch.equal(on_isa(x, weight, None, "auto", num_threads=2), expected)
        os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
