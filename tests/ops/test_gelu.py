"""gelu: the native kernel against float64 and torch."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from op_cases import cases
from op_cases.case import error_of

from vtts_rt.ops.dispatch import backends
from vtts_rt.ops.gelu import Form, gelu, gelu_ref
from vtts_rt.ops.native import STORAGE

needs_native = pytest.mark.skipif(
    "cpu" not in backends("gelu", "cpu"), reason="built without the native extension"
)


@pytest.mark.parametrize("backend", backends("gelu", "cpu"))
def test_errors_are_at_most_twice_those_of_torch(backend: str) -> None:
    for case in cases("gelu", "cpu", "check"):
        if case.takes(backend):
            assert error_of(case, backend).within, (case.name, case.dtype)


@needs_native
@pytest.mark.parametrize("isa", ["scalar", "avx2", "neon"])
@pytest.mark.parametrize("form", get_args(Form))
def test_every_instruction_set(isa: str, form: Form) -> None:
    from vtts_rt import _C

    if not _C.isa_supported(isa):
        pytest.skip(f"no {isa} here")
    x = torch.linspace(-30, 30, 2 * 4003).view(2, -1)
    out = torch.empty_like(x)
    _C.gelu(x.data_ptr(), 2, 4003, form, out.data_ptr(), 2, isa, "float32")
    assert (out - gelu_ref(x, form)).abs().max() < 2e-6
    for value, expected in ((torch.inf, torch.inf), (1e30, 1e30), (-1e30, 0.0)):
        odd = torch.tensor([[value]])
        _C.gelu(odd.data_ptr(), 1, 1, form, odd.data_ptr(), 1, isa, "float32")
        assert float(odd) == pytest.approx(expected, rel=1e-6, abs=1e-6), value


@needs_native
@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize("form", get_args(Form))
def test_a_row_has_the_same_bits_in_any_batch(dtype: torch.dtype, form: Form) -> None:
    x = 3 * torch.randn(701, 83).to(dtype)
    whole = gelu(x, form)
    for start, stop in ((0, 1), (5, 8), (100, 617)):
        assert torch.equal(gelu(x[start:stop], form), whole[start:stop])
    assert gelu(torch.tensor([[torch.nan]], dtype=dtype), form).isnan().all()


def test_an_unknown_form_is_named() -> None:
    with pytest.raises(ValueError, match="gelu: form must be one of exact, tanh, sigmoid, got 'x'"):
        gelu(torch.zeros(1, 1), "x")  # type: ignore[arg-type]
