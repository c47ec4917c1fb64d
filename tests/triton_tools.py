"""Running Triton without a GPU. The interpreter is chosen when triton is imported and cannot share
a process with compilation, so each test runs a script of its own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest


def run_triton(script: str, *, interpret: bool) -> str:
    """stdout of `script` in a fresh Python; skips where triton is not installed."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = str(Path(__file__).parents[1] / "bench")  # for op_cases
    env |= {"TRITON_INTERPRET": "1"} if interpret else {}
    done = subprocess.run(
        [sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


CHECK = """
from op_cases import check
import torch

torch.set_num_threads(1)
num = 0
for case, backend, error in check({op!r}, "cpu"):
    if backend == "triton":
        assert error.within, (case.name, case.dtype, error)
        num += 1
print(num)
"""


def check_interpreted(op: str) -> int:
    """Run the cases of an op (op_cases) with its Triton kernel in the interpreter, each
    against the equation by the 2x rule with poisoned outputs. How many there were."""
    return int(run_triton(CHECK.format(op=op), interpret=True).split()[-1])
