"""The bench's peers on vLLM: the worker and its protocol, with a stand-in for vLLM itself."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bench_rollouts
import pytest
import torchvision_shim
from report import load_results
from report.answers import TABLES
from utils import tiny_checkpoint
from vllm_peer import VllmPeer

from vtts_rt import bench
from vtts_rt.bench import rounds as bench_rounds
from vtts_rt.bench.footage import turned
from vtts_rt.bench.model import moving_frames
from vtts_rt.bench.setting import OPTIONS, QUESTIONS, Setting
from vtts_rt.models.qwen2_5_vl import GEOMETRY
from vtts_rt.types import StrategyName, VideoMetadata
from vtts_rt.video import open_video
from vtts_rt.video.writer import write_video

torchvision_shim.install()

SETTING = Setting(rounds=3, max_tokens=4, clues=[[[2.0, 3.0]], [[2.4, 2.8]]])


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter in whose environment `import vllm` finds the stand-in."""
    folder = tmp_path_factory.mktemp("venv")
    shutil.copy(Path(__file__).with_name("fake_vllm.py"), folder / "vllm.py")
    script = folder / "python"
    script.write_text(f'#!/bin/sh\nPYTHONPATH={folder} exec {sys.executable} "$@"\n')
    script.chmod(0o755)
    return script


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    write_video(path, moving_frames(60, (96, 128)), source_fps=10)
    return path


@pytest.fixture(scope="module")
def metadata(clip: Path) -> VideoMetadata:
    with open_video(str(clip)) as source:
        return source.metadata


@pytest.fixture(scope="module")
def peer(checkpoint: Path, python: Path) -> Iterator[VllmPeer]:
    with VllmPeer(checkpoint, python, threads=1) as peer:
        yield peer


def ask(peer: VllmPeer, clip: Path, metadata: VideoMetadata, strategy: StrategyName) -> list[Any]:
    return peer.ask(
        clip,
        QUESTIONS[0],
        options=OPTIONS,
        metadata=metadata,
        perception=SETTING.perception(strategy).resolve(GEOMETRY),
        clues=SETTING.parsed_clues,
        max_tokens=SETTING.max_tokens,
    )


def test_a_relative_path_finds_the_interpreter(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although the worker runs in a folder of its own."""
    script = tmp_path / "bin" / "python"
    script.parent.mkdir()
    answer = json.dumps({"about": {"device": "cpu", "vllm": "a script"}})
    script.write_text(f"#!/bin/sh\nwhile read line; do echo '{answer}'; done\n")
    script.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    with VllmPeer(checkpoint, Path("bin/python")) as peer:
        assert peer.about["vllm"] == "a script"


def test_the_worker_says_how_vllm_runs(peer: VllmPeer) -> None:
    assert peer.about["vllm"] == "0.0.fake"
    assert peer.about["compiled"] is False and peer.about["threads"] == 1
    assert {"torch", "transformers", "python", "ld_preload", "kv_cache_gib"} <= set(peer.about)


def test_the_published_loop_pays_every_round_in_full(
    peer: VllmPeer, clip: Path, metadata: VideoMetadata
) -> None:
    peer.forget()
    rounds = ask(peer, clip, metadata, "official")
    assert len(rounds) == 3
    for look in rounds:
        assert len(look.token_ids) == 4
        assert look.reuse.frames_decoded == len(set(look.frame_indices))
        assert look.reuse.pairs_encoded == (len(look.frame_indices) + 1) // 2
        assert look.reuse.tokens_prefilled > look.prompt_tokens // 2
        assert look.timings.total >= look.timings.ttft > 0.0


def test_append_shows_new_pairs_only_and_keeps_the_conversation(
    peer: VllmPeer, clip: Path, metadata: VideoMetadata
) -> None:
    peer.forget()
    first, *later = ask(peer, clip, metadata, "append")
    assert first.reuse.tokens_reused == 0
    before = first
    for look in later:
        assert look.reuse.pairs_encoded == len(look.frame_indices) // 2
        # All of the round before, to the last whole block, its answer not computed yet.
        assert look.reuse.tokens_reused == before.prompt_tokens // 16 * 16
        assert look.prompt_tokens > before.prompt_tokens + len(before.token_ids)
        before = look
    pairs = [look.reuse.pairs_encoded for look in (first, *later)]
    assert later[-1].reuse.pairs_reused == sum(pairs[:-1])


def test_questions_that_are_put_together_get_their_own_answers(
    peer: VllmPeer, clip: Path, metadata: VideoMetadata, tmp_path: Path
) -> None:
    videos = [clip, turned(clip, 0.5, tmp_path)]
    alike: Any = {
        "options": OPTIONS,
        "metadata": metadata,
        "perception": SETTING.perception("append").resolve(GEOMETRY),
        "clues": SETTING.parsed_clues,
        "max_tokens": SETTING.max_tokens,
    }

    def content(rounds: list[Any]) -> list[tuple[Any, ...]]:
        return [(r.token_ids, r.prompt_tokens, r.frame_indices, r.sizes) for r in rounds]

    alone, pairs = [], 0
    for video, question in zip(videos, QUESTIONS, strict=False):
        peer.forget()
        alone.append(content(peer.ask(video, question, **alike)))
        pairs += peer.pairs_encoded
    peer.forget()
    together = peer.ask_together(videos, QUESTIONS[:2], **alike)
    assert [content(rounds) for rounds in together] == alone
    assert alone[0] != alone[1]
    assert peer.pairs_encoded == pairs  # the second video is another one


def test_forgetting_makes_the_next_question_cold(
    peer: VllmPeer, clip: Path, metadata: VideoMetadata
) -> None:
    ask(peer, clip, metadata, "official")
    warm = ask(peer, clip, metadata, "official")
    assert all(look.reuse.pairs_encoded == 0 < look.reuse.tokens_reused for look in warm)
    peer.forget()
    cold = ask(peer, clip, metadata, "official")
    assert cold[0].reuse.tokens_reused == 0 < cold[0].reuse.pairs_encoded


def test_a_failure_of_vllm_is_reported_and_survived(
    peer: VllmPeer, clip: Path, metadata: VideoMetadata
) -> None:
    with pytest.raises(RuntimeError, match="failed in ask: ValueError: too many tokens"):
        peer.ask_together(
            [clip, clip],
            ["why?", "when?"],
            metadata=metadata,
            perception=SETTING.perception("official").resolve(GEOMETRY),
            clues=SETTING.parsed_clues,
            max_tokens=1000,
        )
    assert len(ask(peer, clip, metadata, "official")) == 3


def test_an_interpreter_without_vllm_names_the_remedy(checkpoint: Path) -> None:
    with pytest.raises(RuntimeError, match="ModuleNotFoundError.*sh bench/vllm_env.sh DIR"):
        VllmPeer(checkpoint, sys.executable, threads=1)


def test_a_vllm_for_another_device_is_refused(peer: VllmPeer) -> None:
    with pytest.raises(RuntimeError, match="runs on cpu, not on cuda; use --device cpu"):
        peer.require_device("cuda")


def test_the_bench_compares_ours_with_both(
    checkpoint: Path, clip: Path, python: Path, tmp_path: Path
) -> None:
    written = tmp_path / "rounds.json"
    flags = ["--peer", "vllm,vllm-append", "--vllm-python", str(python), "--repeats", "1"]
    flags += ["--max-tokens", "4", "--threads", "1", "--model", str(checkpoint)]
    flags += ["--video", str(clip), "--output-json", str(written)]
    assert bench.main(["rounds", *flags]) == 0
    result = json.loads(written.read_text())
    assert result["vllm"]["vllm"] == "0.0.fake"
    (run,) = result["runs"]
    peers = ["vllm loop", "vllm append"]
    ours = [s + d for s in ("official", "append") for d in ("", f" {bench_rounds.DRAFTS}")]
    names = [*peers, *ours]
    assert set(run["contenders"]) == {n + w for n in names for w in ("", bench_rounds.SAME)}
    found = {(c["name"], c["baseline"]): c for c in run["comparisons"]}
    assert set(found) == {(name, peer) for name in ("official", "append") for peer in peers}
    # Where both should do the same: frames, sizes and words are ours.
    assert found["official", "vllm loop"]["differences"] == []
    same = found["append", "vllm append"]
    assert not [d for d in same["differences"] if "prompt tokens of round 1" in d or "frames" in d]
    assert same["equal_tokens"] == [False] * 3
    assert found["append", "vllm loop"]["differences"] is None
    first = [
        run["contenders"][name]["rounds"][0]["timings_ms"]["total"]
        for name in ("vllm append", "append")
    ]
    assert same["first_round_speedup"] == pytest.approx(first[0] / first[1], rel=0.01)


def test_concurrent_questions_are_served_by_both(
    checkpoint: Path, clip: Path, python: Path, tmp_path: Path
) -> None:
    flags = ["--peer", "vllm,vllm-append", "--vllm-python", str(python), "--repeats", "2"]
    flags += ["--max-concurrency", "2", "--num-prompts", "2", "--num-videos", "2", "--rounds", "2"]
    flags += ["--one-video", "0", "--max-tokens", "4", "--threads", "1", "--video", str(clip)]
    flags += ["--model", str(checkpoint), "--result-dir", str(tmp_path)]
    assert bench.main(["serve", *flags]) == 0
    (written,) = tmp_path.glob("concurrent_*.json")
    result = json.loads(written.read_text())
    assert result["vllm"]["vllm"] == "0.0.fake"
    sides = {part["strategy"]: part for part in result["sweep"]}
    assert list(sides) == ["append", "vllm loop", "vllm append"]
    for part in sides.values():
        assert part["completed"] == part["max_concurrency"] == 2
        assert part["output_lens"] == [8, 8]
        assert len(part["durations"]) == 2 and part["duration"] in part["durations"]
        assert part["request_throughput"] == pytest.approx(2 / part["duration"])
    # Cold each time: both videos are encoded anew, by either side as often.
    pairs = [sides[name]["reuse"]["pairs_encoded"] for name in ("append", "vllm append")]
    assert pairs[0] == pairs[1] > 0
    loop, append = result["comparisons"]
    assert (loop["baseline"], loop["same_work"]) == ("vllm loop", False)
    assert (append["baseline"], append["same_work"]) == ("vllm append", True)
    ratio = sides["vllm append"]["duration"] / sides["append"]["duration"]
    assert append["throughput_ratio"] == pytest.approx(ratio)
    filed = load_results(tmp_path, "concurrent")
    told = TABLES["concurrent"][1](filed[0])
    assert f"`append` answers {ratio:.2f} times as many questions a second as the vllm app" in told
    assert "| vllm loop, 2 on 2 videos |" in told and "vLLM 0.0.fake" in told


def test_rollouts_of_all_sides(checkpoint: Path, clip: Path, python: Path, tmp_path: Path) -> None:
    """Clues of all members alike: a published loop's rounds are one prompt with n; else many."""
    flags = ["--peer", "hf,vllm,vllm-append", "--vllm-python", str(python), "--repeats", "1"]
    flags += ["--num-answers", "3", "--max-tokens", "2", "--threads", "1", "--video", str(clip)]
    flags += ["--model", str(checkpoint), "--result-dir", str(tmp_path)]
    assert bench.script(bench_rollouts, flags) == 0
    (filed,) = load_results(tmp_path, "rollouts")
    counts = {
        (name, run["clues"]): side["counts"]
        for run in filed.data["runs"]
        for name, side in run["contenders"].items()
    }
    assert len(counts) == 10
    opened = {key: own["files_opened"] for key, own in counts.items()}
    assert opened["transformers loop", "same"] == opened["vllm loop", "same"] == 3
    assert opened["transformers loop", "own"] == opened["vllm loop", "own"] == 1 + 2 * 3
    assert opened["append", "own"] == opened["official", "own"] == 1
    # Our layout costs the same pairs on either side; the published one no fewer than ours.
    for kind in ("same", "own"):
        pairs = {name: counts[name, kind]["pairs_encoded"] for name, k in counts if k == kind}
        assert pairs["append"] == pairs["vllm append"] <= pairs["official"]
        assert pairs["official"] <= pairs["vllm loop"] <= pairs["transformers loop"]
    told = TABLES["rollouts"][1](filed)
    assert "own clue, float32: `append` is" in told and "vLLM 0.0.fake" in told
    assert "3 answers x 3 rounds x 2 tokens" in told


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--peer", "hf"], "peer must be none, or on vLLM, got 'hf'"),
        (["--peer", "vllm", "--max-concurrency", "4"], "max_concurrency must be num_prompts"),
        (["--repeats", "0"], "repeats must be >= 1, got 0"),
    ],
)
def test_flags_of_concurrent_questions_are_named(
    flags: list[str], message: str, python: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        bench.main(["serve", "--vllm-python", str(python), *flags])
