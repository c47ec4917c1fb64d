"""Every op has a kernel, a reference, cases and a test of one name; the docs say so."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
from op_cases import CASES
from triton_tools import run_triton

from vtts_rt import ops
from vtts_rt.ops import dispatch

ROOT = Path(__file__).resolve().parents[1]
OPS = list(dispatch.registry)
BACKENDS = {name: {b.name for b in op.backends} for name, op in dispatch.registry.items()}
# "sampling" is what is done, and `sample` how one asks for it.
FUNCTIONS = {"sampling": "sample"}


@pytest.mark.parametrize("op", OPS)
def test_an_op_has_one_name_in_all_places(op: str) -> None:
    kernels = [f"kernels/{op}.py", f"csrc/core/{op}.cpp", f"csrc/cuda/{op}.cu"]
    of_rows = f"void {op}(" in (ROOT / "csrc/core/row_ops.h").read_text()
    assert of_rows or any((ROOT / place).exists() for place in kernels), f"none of {kernels}"
    for place in (
        f"vtts_rt/ops/{op}.py",
        f"bench/op_cases/{op}.py",
        f"tests/ops/test_{op}.py",
    ):
        assert (ROOT / place).exists(), place
    module = importlib.import_module(f"vtts_rt.ops.{op}")
    assert callable(getattr(ops, FUNCTIONS.get(op, op))) and callable(getattr(module, f"{op}_ref"))
    assert op in CASES
    assert (ROOT / f"tests/ops/test_{op}.py").read_text().count("\ndef test_") >= 3


def test_nothing_else_claims_to_be_an_op() -> None:
    assert set(CASES) == set(OPS)
    kernels = {path.stem for path in (ROOT / "kernels").glob("[a-z]*.py")}
    assert kernels <= {*OPS, "merge_parts"}, "merge_parts is what two of them share"


@pytest.mark.parametrize("op", OPS)
def test_a_triton_kernel_is_checked_in_the_interpreter(op: str) -> None:
    if "triton" in BACKENDS[op]:
        text = "".join(p.read_text() for p in (ROOT / "tests/ops").glob(f"test_{op}*.py"))
        assert f'check_interpreted("{op}")' in text
        variants = (ROOT / "bench" / "kernel_variants.py").read_text()
        assert f'    "{op}": ' in variants


CHOSEN = """
from op_cases import CASES, cases
from op_cases.case import error_of
from vtts_rt.ops.dispatch import backends
import torch

torch.set_num_threads(1)
for op in CASES:
    if "triton" in backends(op, "cpu"):
        taken = [case for case in cases(op, "cpu", "check") if case.takes("triton")][::6]
        for case in taken:
            error = error_of(case, "triton")
            assert error.within, (op, case.name, case.dtype, error)
        print(op)
"""


def test_some_cases_of_every_kernel_in_the_interpreter() -> None:
    """All of them: `check_interpreted` in tests/ops, which are slow."""
    checked = run_triton(CHOSEN, interpret=True).split()
    assert checked == [op for op in CASES if "triton" in BACKENDS[op]]


def test_the_seven_steps_name_the_places() -> None:
    text = (ROOT / "docs" / "ops.md").read_text(encoding="utf-8")
    part = text[text.index("## Add an op in seven steps") :].split("\n## ")[0]
    assert [int(n) for n in re.findall(r"^(\d)\. ", part, re.MULTILINE)] == list(range(1, 8))
    for place in (
        "vtts_rt/ops/<op>.py",
        "<op>_ref",
        "dispatch.register",
        "kernels/<op>.py",
        "csrc/core/<op>.cpp",
        "bench/kernel_variants.py",
        "bench/op_cases/<op>.py",
        "tests/ops/test_<op>.py",
    ):
        assert place in part, place
    assert "ops.md" in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_the_error_table_has_a_row_for_every_backend() -> None:
    """The committed result; `python bench/bench_errors.py --result-dir bench/results` renews it."""
    from report import load_results

    found = load_results(ROOT / "bench" / "results", "errors")
    assert found, "no bench/results/errors_*.json"
    rows = [row for result in found for row in result.data["results"]]
    assert all(row["within"] for row in rows)
    measured = {(row["op"], row["backend"].split(",")[0]) for row in rows}
    for op in OPS:
        wanted = BACKENDS[op] & {"triton", "cpu"}
        missing = wanted - {backend for name, backend in measured if name == op}
        assert not missing, f"{op}: {missing}"
