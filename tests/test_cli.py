"""The command line in the process: contract of --json, exit statuses, one line for a mistake."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from utils import tiny_checkpoint

import vtts_rt
from vtts_rt import Runtime, SamplingParams
from vtts_rt.cli import main
from vtts_rt.video.writer import write_video

SMALL = ["--sample-fps", "1", "--min-pixels", "3136", "--total-pixels", "40000"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("clip") / "v.mp4"
    frames = (np.full((64, 96, 3), i, np.uint8) for i in range(40))
    write_video(path, frames, source_fps=8.0)
    return str(path)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_checkpoint(tmp_path_factory.mktemp("model")))


def ask(clip: str, checkpoint: str, *more: str) -> list[str]:
    return ["ask", clip, "which?", "--model", checkpoint, *SMALL, "--max-tokens", "4", *more]


def test_weights_are_quantized_on_request(
    clip: str, checkpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("int8", "fp8"):
        assert main(ask(clip, checkpoint, "--rounds", "1", "--quantization", name)) == 0
    bad = ask(clip, checkpoint, "--quantization", "int8", "--dtype", "float16")
    assert main(bad) == 2
    assert "model must be float32 or bfloat16 on cpu for int8" in capsys.readouterr().err


def test_json_is_the_contract(
    clip: str, checkpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    clues = '[[[1,3]],{"spans":[[1.5,2.5]],"boxes":[[0.25,0.25,0.75,0.75]]}]'
    arguments = ask(clip, checkpoint, "--strategy", "append", "--rounds", "3", "--ignore-eos",
                    "--option", "red", "--option", "blue", "--assume-clues", clues,
                    "--seed", "7", "--json")  # fmt: skip
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    answer = json.loads(out)
    assert out.count("\n") == 1 and err == ""
    assert set(answer) == {
        "schema_version", "answer", "option", "stop_reason", "model", "strategy", "parity",
        "video_wrapper", "dialect", "seed", "weights_version", "versions", "videos", "rounds",
        "timings_ms",
    }  # fmt: skip
    assert (answer["strategy"], answer["parity"], answer["seed"]) == ("append", "release", 7)
    assert answer["stop_reason"] == "max_rounds" and len(answer["rounds"]) == 3
    assert answer["videos"] == [
        {
            "num_frames": 40,
            "source_fps": 8.0,
            "duration_seconds": 5.0,
            "height": 64,
            "width": 96,
            "decoder": "pyav",
        }
    ]
    keys = {
        "index", "prompt", "text", "token_ids", "logprobs", "clue", "frame_indices",
        "timestamps_seconds", "resized_hw", "grid_thw", "sample_fps", "segments",
        "prompt_tokens", "completion_tokens", "reuse", "timings_ms", "finish_reason",
    }  # fmt: skip
    for index, result in enumerate(answer["rounds"]):
        assert keys <= set(result)
        assert result["index"] == index and result["completion_tokens"] == 4
        assert result["finish_reason"] == "length"
        assert len(result["logprobs"]) == 4 and max(result["logprobs"]) <= 0
        assert result["frame_indices"] == [
            f for s in result["segments"] for f in s["frame_indices"]
        ]
        assert len(result["timestamps_seconds"]) == len(result["frame_indices"])
        assert result["prompt"].count("<|video_pad|>") == len(result["segments"])
        assert set(result["reuse"]) == {
            "frames_decoded", "frames_codec_decoded", "frames_reused", "frames_guessed",
            "frames_guessed_used", "pairs_encoded", "pairs_reused", "tokens_prefilled",
            "tokens_reused", "text_tokens_prefilled", "tokens_drafted", "tokens_accepted",
        }  # fmt: skip
        assert set(result["timings_ms"]) == {
            "decode", "preprocess", "vision", "prefill", "generate", "total",
            "queue", "ttft",
        }  # fmt: skip
    assert answer["rounds"][1]["clue"] == {
        "spans": [[1.5, 2.5]],
        "boxes": [[0.25, 0.25, 0.75, 0.75]],
    }
    assert answer["rounds"][2]["segments"][0]["box"][0] > 0


def test_sampling_flags(
    clip: str, checkpoint: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is not given is left to the checkpoint; what is wrong is one line."""
    asked: list[SamplingParams] = []

    def noted(self: Runtime, *, sampling: SamplingParams, **more: Any) -> None:
        asked.append(sampling)
        raise ValueError("noted")

    monkeypatch.setattr(Runtime, "ask", noted)
    flags = (
        *("--temperature", "0.5", "--repetition-penalty", "1.05", "--presence-penalty", "1"),
        *("--frequency-penalty", "-1", "--stop", "a", "--stop", "b"),
    )
    for more in ((), flags):
        assert main([*ask(clip, checkpoint)[:-2], *more]) == 2
    assert capsys.readouterr().err == "vtts-rt: noted\n" * 2
    assert asked[0] == SamplingParams()
    assert asked[1] == SamplingParams(
        temperature=0.5,
        repetition_penalty=1.05,
        presence_penalty=1.0,
        frequency_penalty=-1.0,
        stop=("a", "b"),
    )
    assert main(ask(clip, checkpoint, "--presence-penalty", "3")) == 2
    line = "vtts-rt: SamplingParams: presence_penalty must be in [-2, 2], got 3.0\n"
    assert capsys.readouterr().err == line


def test_plain_output_is_the_answer_on_stdout(
    clip: str, checkpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(ask(clip, checkpoint, "--rounds", "1")) == 0
    out, err = capsys.readouterr()
    assert out.count("\n") == 1 and "stopped: max_rounds" in err


def test_what_was_said_is_not_cut(capsys: pytest.CaptureFixture[str]) -> None:
    clip = str(Path(vtts_rt.__file__).parent / "assets/clip.mp4")
    assert main(["ask", clip, "Which pattern is on the red card?", "--rounds", "2"]) == 0
    err = capsys.readouterr().err
    assert "…" not in err and "glue" in err


def test_context_and_several_videos(
    clip: str, checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = tmp_path / "subtitles.txt"
    words.write_text("somebody speaks", encoding="utf-8")
    arguments = ask(clip, checkpoint, "--rounds", "1", "--context", str(words), "--json",
                    "--and-video", clip, "--strategy", "append")  # fmt: skip
    assert main(arguments) == 0
    answer = json.loads(capsys.readouterr().out)
    assert "somebody speaks" in answer["rounds"][0]["prompt"] and len(answer["videos"]) == 2


def test_the_rate_of_an_array(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(tmp_path / "frames.npy")
    np.save(path, np.zeros((12, 64, 96, 3), np.uint8))
    assert main(ask(path, checkpoint, "--source-fps", "4", "--rounds", "1", "--json")) == 0
    (video,) = json.loads(capsys.readouterr().out)["videos"]
    assert (video["num_frames"], video["source_fps"], video["duration_seconds"]) == (12, 4.0, 3.0)
    assert main(ask(path, checkpoint)) == 2
    assert "source_fps must be" in capsys.readouterr().err


def test_plan(clip: str, checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    shared = ["plan", clip, "which?", "--model", checkpoint, *SMALL]
    assert main([*shared, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert [r["index"] for r in plan["rounds"]] == [0, 1, 2]
    assert main(shared) == 0
    assert f"{plan['rounds'][0]['prompt_tokens']:,}" in capsys.readouterr().out


def test_env_names_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {"versions", "optional", "build", "device", "ops", "environment"} <= set(report)
    told = report["ops"]["decoding as CUDA graphs"]
    assert told == "yes" if torch.cuda.is_available() else told == "no (the model runs on cpu)"
    assert any(name.startswith("patchify") for name in report["ops"])
    for text in report["optional"].values():
        assert "pip install" in text or text[0].isdigit()
    assert main(["env"]) == 0
    assert "patchify" in capsys.readouterr().out


GOOD = "CLIP"  # stands for the good clip


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["ask"], 2, "required"),
        (["nonsense"], 2, "invalid choice"),
        (["ask", "/nowhere.mp4", "q"], 2, "/nowhere.mp4"),
        (["ask", "http://localhost/a.mp4", "q"], 2, "allow"),
        (["ask", GOOD, " "], 2, "question"),
        (["ask", GOOD, "q", "--option", ""], 2, "option"),
        (["ask", GOOD, "q", "--rounds", "0"], 2, "max_rounds"),
        (["ask", GOOD, "q", "--rounds", "x"], 2, "--rounds"),
        (["ask", GOOD, "q", "--strategy", "best"], 2, "--strategy"),
        (["ask", GOOD, "q", "--sample-fps", "-1"], 2, "sample_fps"),
        (["ask", GOOD, "q", "--sample-fps", "nan"], 2, "sample_fps"),
        (["ask", GOOD, "q", "--temperature", "-1"], 2, "temperature"),
        (["ask", GOOD, "q", "--max-tokens", "0"], 2, "max_tokens"),
        (["ask", GOOD, "q", "--seed", "-1"], 2, "seed"),
        (["ask", GOOD, "q", "--assume-clues", "{"], 2, "JSON"),
        (["ask", GOOD, "q", "--assume-clues", "3"], 2, "list"),
        (["ask", GOOD, "q", "--assume-clues", "[[[1,2,3]]]"], 2, "assume_clues"),
        (["ask", GOOD, "q", "--assume-clues", "[" * 100000], 2, "JSON"),
        (["ask", GOOD, "q", "--assume-clues", "9" * 5000], 2, "JSON"),
        (["ask", GOOD, "q", "--context", "/nowhere.txt"], 2, "context"),
        (["ask", GOOD, "q", "--context", "a\0b"], 2, "ask: context must be"),
        (["ask", GOOD, "q", "--context", ""], 2, "ask: context must be"),
        (["plan", GOOD, "q", "--context", "LATIN"], 2, "plan: context must be a readable UTF-8"),
        (["ask", GOOD, "caf\udce9?"], 2, "ask: question must be valid Unicode"),
        (["ask", GOOD, "q", "--option", "caf\udce9"], 2, "ask: options must be valid Unicode"),
        (["ask", GOOD, "q", "--stop", "caf\udce9"], 2, "valid Unicode"),
        (["ask", "caf\udce9.mp4", "q"], 2, "video must be"),
        (["ask", "a\0b", "q"], 2, "video must be"),
        (["ask", "FOLDER", "q"], 2, "video must be"),
        (["ask", "http://[x/", "q", "--allow-urls"], 2, "video must be a URL"),
        (["ask", "http://127.0.0.1:1/a b", "q", "--allow-urls"], 2, "video must be a URL"),
        (["ask", GOOD, "q", "--timeout-seconds", "-1"], 2, "timeout_seconds"),
        (["ask", GOOD, "q", "--timeout-seconds", "inf"], 2, "timeout_seconds"),
        (["ask", GOOD, "q", "--device", "meta"], 2, "device"),
        (["plan", GOOD, " "], 2, "plan: question"),
        (["plan", GOOD, "q", "--max-tokens", "0"], 2, "plan: max_tokens"),
        (["ask", GOOD, "q", "--prompts", "/nowhere.json"], 2, "prompts"),
        (["ask", GOOD, "q", "--dtype", "int3"], 2, "dtype"),
        (["ask", GOOD, "q", "--device", "tpu"], 2, "device"),
        (["ask", GOOD, "q", "--start-seconds", "9", "--end-seconds", "3"], 2, "seconds"),
        (["ask", GOOD, "q", "--timeout-seconds", "0"], 2, "timeout_seconds"),
        (["ask", GOOD, "q", "--threads", "-1"], 2, "threads"),
        (["ask", GOOD, "q", "--source-fps", "0"], 2, "source_fps"),
        (["ask", GOOD, "q", "--media-limit", "max_frames=9"], 2, "MediaLimits.max_frames"),
        (["ask", GOOD, "q", "--media-limit", "max_frames=x"], 2, "max_frames must be a number"),
        (["ask", GOOD, "q", "--media-limit", "frames=9"], 2, "'frames' is no bound"),
        (["ask", GOOD, "q", "--media-limit", "max_frames=0"], 2, "max_frames must be"),
        (["plan", "/nowhere.mp4", "q"], 2, "/nowhere.mp4"),
    ],
)
def test_a_mistake_is_one_line_and_exit_status_2(
    clip: str,
    checkpoint: str,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    status: int,
    message: str,
) -> None:
    latin = Path(clip).parent / "latin.txt"
    latin.write_bytes(b"caf\xe9")
    files = {GOOD: clip, "LATIN": str(latin), "FOLDER": str(latin.parent)}
    filled = [files.get(a, a) for a in arguments]
    if len(filled) > 2:
        filled += ["--model", checkpoint, *([] if "--sample-fps" in filled else SMALL)]
    assert main(filled) == status
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and message in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "arguments",
    [["bench", "x"], ["bench", "rounds", "--x"], ["eval", "x"], ["train", "x"], ["report", "--x"]],
)
def test_a_wrong_flag_of_any_command_is_one_line(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith(f"vtts-rt {arguments[0]}")


@pytest.mark.parametrize("model", ["no/such-model", "/nowhere", "NOT A NAME"])
def test_an_unknown_model(clip: str, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ask", clip, "q", "--model", model]) in (1, 2)
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and model in err


def test_a_checkpoint_that_lacks_tensors(
    clip: str, checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file, save_file

    for name in Path(checkpoint).iterdir():
        if name.suffix != ".safetensors":
            (tmp_path / name.name).write_bytes(name.read_bytes())
    tensors = load_file(Path(checkpoint) / "model.safetensors")
    gone = sorted(tensors)[0]
    del tensors[gone]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert main(["ask", clip, "q", "--model", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "missing" in err


def test_an_unexpected_failure_is_one_line_and_status_1(
    clip: str, checkpoint: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise KeyError("inside\nout")

    monkeypatch.setattr("vtts_rt.runtime.Runtime.ask", broken)
    assert main(ask(clip, checkpoint)) == 1
    assert capsys.readouterr().err == "vtts-rt: KeyError: 'inside\\nout'\n"


# Ctrl-C in the middle of an answer, whatever the machine's speed: the third forward pass sends it.
INTERRUPTED = """
import os, signal, sys
from vtts_rt import Runtime, SamplingParams
from vtts_rt.cli import main
from vtts_rt.engine.engine import Engine

step, calls = Engine.step, []

def interrupting(self):
    calls.append(None)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGINT)
    return step(self)

Engine.step = interrupting
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
sys.exit(main())
"""


def test_ctrl_c_ends_without_a_traceback(clip: str, checkpoint: str) -> None:
    arguments = ask(clip, checkpoint, "--ignore-eos")
    arguments[arguments.index("--max-tokens") + 1] = "9000"
    command = [sys.executable, "-c", INTERRUPTED, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 130 and done.stdout == ""
    assert "Traceback" not in done.stderr and "interrupted" in done.stderr
