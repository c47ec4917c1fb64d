"""The backend registry: preference, wishes, reasons."""

from __future__ import annotations

import logging

import pytest

from vtts_rt.models.qwen2_5_vl import GEOMETRY
from vtts_rt.ops import dispatch, patchify
from vtts_rt.ops.dispatch import Backend, Op


def op(**refusals: str | None) -> Op:
    """An op whose backends, in order, refuse with the given reason or accept (None)."""
    backends = tuple(
        Backend(name, lambda device, why=why: why, lambda: None) for name, why in refusals.items()
    )
    return Op("demo", *backends)


def test_auto_takes_the_first_that_can_run_and_says_so_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    demo = op(cuda="no device", cpu=None, reference=None)
    with caplog.at_level(logging.INFO, logger="vtts_rt"):
        assert [demo.choose("cpu", "auto")[0].name for _ in range(3)] == ["cpu"] * 3
    assert caplog.messages == ["demo on cpu: backend cpu (no cuda: no device)"]


def test_a_named_backend_runs_or_fails_with_the_reason() -> None:
    demo = op(cuda="frames are on cpu", cpu=None, reference=None)
    assert demo.choose("cpu", "reference")[0].name == "reference"
    with pytest.raises(RuntimeError) as error:
        demo.resolve("cpu", "cuda")
    assert str(error.value) == (
        "demo: backend 'cuda' unavailable: frames are on cpu; supported here: cpu, reference"
    )
    with pytest.raises(ValueError, match="demo: backend must be auto, cuda, cpu, reference, got"):
        demo.resolve("cpu", "tpu")


def test_nothing_usable_names_every_reason() -> None:
    with pytest.raises(RuntimeError, match="no backend for device 'cpu': a: why a; b: why b"):
        op(a="why a", b="why b").resolve("cpu")


def test_the_environment_overrides_auto_but_not_an_argument(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    demo = op(cuda="no device", cpu=None, reference=None)
    assert demo.choose("cpu", "auto")[0].name == "cpu"
    monkeypatch.setenv("VTTS_RT_BACKEND", "other=x,demo=reference")
    assert demo.choose("cpu", "auto")[0].name == "reference"
    assert demo.choose("cpu", "cpu")[0].name == "cpu"
    assert demo.explain("demo", "cpu") == ("demo on cpu", "reference", "asked for")
    monkeypatch.setenv("VTTS_RT_BACKEND", "demo=cuda")
    with pytest.raises(RuntimeError, match="no device"):
        demo.resolve("cpu")
    row = demo.explain("demo", "cpu")
    assert row.backend == "none" and "no device" in row.reason


def test_a_call_that_the_first_refuses_or_leaves_goes_to_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def odd(number: int) -> str | None:
        return "an odd number" if number % 2 else None

    def large(number: int) -> str | None:
        return "a large number" if number > 9 else None

    backends = (
        Backend("cpu", dispatch.anything, lambda number: -number, odd, large),
        Backend("reference", dispatch.anything, lambda number: number),
    )
    demo = Op("demo", *backends)
    assert [demo("cpu", "auto", number) for number in (2, 3, 12)] == [-2, 3, 12]
    assert demo.choose("cpu", "auto", 12)[1] == "no cpu: a large number"
    assert demo("cpu", "cpu", 12) == -12
    with pytest.raises(ValueError, match="demo: arguments must be what backend 'cpu' takes, got"):
        demo("cpu", "cpu", 3)
    monkeypatch.setenv("VTTS_RT_BACKEND", "demo=cpu")
    assert [demo("cpu", "auto", number) for number in (12, 3)] == [-12, 3]
    monkeypatch.delenv("VTTS_RT_BACKEND")
    with pytest.raises(RuntimeError, match="no backend on cpu takes the arguments: no cpu: an odd"):
        Op("demo", backends[0])("cpu", "auto", 3)


def test_explain_lists_the_registered_ops() -> None:
    rows = {row.op: row for row in dispatch.explain()}
    assert rows["rmsnorm on cpu"].backend in ("cpu", "reference")
    assert rows["rmsnorm on cpu"].reason.startswith("no triton: tensors are on cpu")
    assert rows["patchify on cpu"].backend in ("cpu", "reference")


def test_the_override_reaches_an_op(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VTTS_RT_BACKEND", "patchify=gpu")
    with pytest.raises(ValueError, match="patchify: backend must be auto, triton, cuda, cpu"):
        patchify([], GEOMETRY)
