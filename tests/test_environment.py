"""`vtts-rt env` names every choice and its reason."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from vtts_rt.cli import main
from vtts_rt.environment import environment
from vtts_rt.ops import dispatch, native
from vtts_rt.ops.decode_step import MAX_ROWS
from vtts_rt.video.index_cache import FILE_NAME


def test_required_packages_are_those_of_pyproject() -> None:
    text = (Path(__file__).resolve().parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    listed = re.search(r"^dependencies = \[(.*?)\]", text, re.DOTALL | re.MULTILINE)
    assert listed is not None
    needed = re.findall(r'"([a-z]+)', listed[1])
    versions = environment()["versions"]
    assert set(versions) == {"vtts_rt", "python", *needed}
    assert "missing" not in versions.values()


def test_every_op_has_a_line_with_backend_and_reason_for_each_device() -> None:
    ops = environment()["ops"]
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for op in dispatch.registry:
        for device in devices:
            said = ops[f"{op} on {device}"]
            backend, _, reason = said.partition(" (")
            assert backend in dispatch.backends(op, device), said
            assert reason.endswith(")") and len(reason) > 3, said


def test_choices_inside_and_above_ops_are_reported() -> None:
    ops = environment()["ops"]
    assert ops["instruction set of native kernels"].split()[0] in (
        *("neon", "avx512", "avx2", "scalar", "none"),
    )
    assert ops["decoding as CUDA graphs"].startswith(("yes", "no ("))
    assert ops["triton kernels"]


@pytest.mark.parametrize(
    ("has", "said"),
    [
        ({"avx2", "avx512", "avx512_bf16", "amx"}, "bfloat16 (products by amx)"),
        ({"avx2", "avx512", "avx512_bf16"}, "bfloat16 (products by avx512_bf16)"),
        ({"avx2", "avx512"}, "float32 (neither AMX nor AVX512_BF16: bfloat16 is widened)"),
    ],
)
def test_the_dtype_of_auto_is_reported_with_its_reason(
    has: set[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = pytest.importorskip("vtts_rt._C", reason="built without the native extension")
    monkeypatch.setattr(core, "isa_supported", lambda isa: isa in has)
    assert environment()["ops"]['dtype "auto" of bfloat16 models on cpu'] == said


def test_attention_is_reported_by_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    def told() -> dict[str, str]:
        ops = environment()["ops"]
        kinds = [f"attention in {dtype} on cpu" for dtype in ("float32", "bfloat16")]
        return {kind: ops[kind].partition(" ")[0] for kind in kinds}

    ours = "cpu" if native.supports("cpu") is None else "torch"
    assert list(told().values()) == [ours, ours]
    one_call = f"decoding of up to {MAX_ROWS} rows in one native call"
    assert environment()["ops"][one_call].startswith("yes") == (ours == "cpu")
    monkeypatch.setenv("VTTS_RT_BACKEND", "paged_attention=reference")
    assert set(told().values()) == {"reference"}
    assert environment()["ops"][one_call].startswith("no")


def test_a_requested_backend_is_reported_or_why_it_cannot_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VTTS_RT_BACKEND", "rmsnorm=reference,swiglu=triton,rotary=abacus")
    assert main(["env", "--json"]) == 0
    ops = json.loads(capsys.readouterr().out)["ops"]
    assert ops["rmsnorm on cpu"] == "reference (asked for)"
    assert ops["swiglu on cpu"].startswith("none (swiglu: backend 'triton' unavailable: ")
    assert ops["rotary on cpu"].startswith("none (rotary: backend must be ")


def test_decoders_and_the_index_cache_are_reported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("VTTS_RT_CACHE_DIR", str(tmp_path))
    (tmp_path / FILE_NAME).write_bytes(bytes(2_500_000))
    video = environment()["video"]
    assert video["pyav on cpu"] and video["auto"].startswith(("pyav", "dali"))
    assert video["dali on cpu"].startswith(("vp8, vp9, mjpeg; PyAV", "no (nvidia-dali is not"))
    assert torch.cuda.is_available() or video["dali on cuda"].startswith("no (")
    assert video["index cache"] == f"{tmp_path}, 2.5 MB"
    monkeypatch.setenv("VTTS_RT_CACHE_DIR", "/not/there")
    assert environment()["video"]["index cache"] == "/not/there, 0.0 MB"
    monkeypatch.setenv("VTTS_RT_CACHE_DIR", "off")
    assert environment()["video"]["index cache"].startswith("off")


def test_the_build_says_what_was_left_out() -> None:
    build = environment()["build"]
    assert "cuda" in build or "extension" in build


def test_the_command_prints_all_sections(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env"]) == 0
    shown = capsys.readouterr().out
    for section in ("versions:", "optional:", "build:", "device:", "ops:", "environment:"):
        assert f"\n{section}" in f"\n{shown}"
