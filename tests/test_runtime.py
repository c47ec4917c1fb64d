"""Rounds and Runtime on a small random checkpoint and a small real file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from utils import CLUES, LOOK, choose_by, request

from vtts_rt import EngineConfig, PerceptionConfig, Runtime, SamplingParams
from vtts_rt.engine.sequence import GenerationRequest
from vtts_rt.models.base import ForwardBatch, VisionRows
from vtts_rt.models.mrope import MropePositions, build_position_ids
from vtts_rt.models.qwen2_5_vl import GEOMETRY
from vtts_rt.models.tokenizer import encode_prompt
from vtts_rt.ops.patchify import PatchifyJob
from vtts_rt.rounds.results import Answer, AnswerReady
from vtts_rt.types import Prompt
from vtts_rt.video import open_video

FORCED = SamplingParams(max_tokens=6, ignore_eos=True)


@pytest.fixture()
def runtime(checkpoint: Path) -> Iterator[Runtime]:
    with Runtime.from_pretrained(checkpoint, engine=EngineConfig(kv_bytes=1 << 26)) as runtime:
        yield runtime


def ask(runtime: Runtime, clip: Any, strategy: str, **more: Any) -> Answer:
    return runtime.ask(**request(clip, strategy, **more))


def logits_of(model: Any, clip: Path, encoded: Any) -> torch.Tensor:
    """Logits of one forward pass over a whole conversation, nothing cached."""
    with open_video(clip) as source, torch.inference_mode():
        ids, rows, features = torch.tensor(encoded.token_ids), [], []
        for span in encoded.spans:
            segment = span.segment
            frames = dict(source.read(segment.frame_indices))
            jobs = [
                PatchifyJob(
                    frames[p.frame_a],
                    frames[p.frame_b],
                    segment.box,
                    segment.resized_hw,
                    segment.resize,
                )
                for p in segment.pairs
            ]
            rows.append(torch.arange(span.start, span.start + span.length))
            features.append(model.encode(jobs))
        positions = build_position_ids(encoded, MropePositions("release", 2.0))
        vision = VisionRows(torch.cat(rows), torch.cat(features))
        batch = ForwardBatch(ids, vision, positions, [0, len(ids)])
        logits: torch.Tensor = model.logits(model(batch))
        return logits


# -- reuse ----------------------------------------------------------------------------------


def test_append_pays_only_for_what_is_new(
    runtime: Runtime, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[GenerationRequest] = []
    add = runtime.engine.add

    def spy(request: GenerationRequest) -> int:
        seen.append(request)
        return add(request)

    monkeypatch.setattr(runtime.engine, "add", spy)
    answer = ask(runtime, clip, "append")
    assert answer.stop_reason == "max_rounds" and len(answer.rounds) == 3
    decoded: set[int] = set()
    for index, result in enumerate(answer.rounds):
        frames = set(result.frames)
        assert result.reuse.frames_decoded <= len(frames - decoded)
        assert result.reuse.frames_decoded + result.reuse.frames_reused == len(frames)
        decoded |= frames
        assert result.reuse.pairs_encoded == len(result.plan.segments)
        assert result.reuse.pairs_reused == sum(len(r.plan.segments) for r in answer.rounds[:index])
        assert result.reuse.tokens_prefilled + result.reuse.tokens_reused == result.prompt_tokens
    for before, result, sent in zip(answer.rounds, answer.rounds[1:], seen[1:], strict=False):
        added = encode_prompt(
            runtime.engine.tokenizer, Prompt((result.prompt.split("<|vision_start|>")[0],))
        )
        assert added.token_ids  # the round begins by closing the model's turn
        assert result.prompt.startswith("<|im_end|>\n<|im_start|>user\n")
        # the round's own text, and the one token whose KV was still pending
        start = before.prompt_tokens + len(before.token_ids)
        new = sent.prompt
        due = new.num_text_tokens(start, len(new.token_ids)) + 1
        assert result.reuse.text_tokens_prefilled == due
        assert result.reuse.tokens_reused == start - 1
    last = answer.rounds[-1]
    whole = seen[-1].prompt.extended(last.token_ids)
    expected = logits_of(runtime.engine.model, clip, whole)[len(seen[-1].prompt) - 1 : -1]
    got = expected.log_softmax(-1)[range(6), last.token_ids]
    assert torch.allclose(torch.tensor(last.logprobs), got, atol=1e-4)
    runtime.engine.check_integrity()


def test_the_same_question_again_costs_nothing(runtime: Runtime, clip: Path) -> None:
    first, again = (ask(runtime, clip, "append") for _ in range(2))
    for a, b in zip(first.rounds, again.rounds, strict=True):
        assert a.token_ids == b.token_ids
        assert (b.reuse.frames_decoded, b.reuse.pairs_encoded, b.reuse.tokens_prefilled) == (
            0,
            0,
            1,
        )


def test_refresh_keeps_the_text_context(runtime: Runtime, clip: Path) -> None:
    answer = ask(runtime, clip, "refresh", context="subtitle " * 40)
    head = len(runtime.engine.tokenizer.encode(answer.rounds[0].prompt.split("<0.0s>")[0]))
    for result in answer.rounds[1:]:
        assert result.reuse.tokens_reused >= head - 1
        assert result.reuse.text_tokens_prefilled < head / 4
        assert "An earlier look pointed to the time spans" in result.prompt
    # The same frames asked about again: features are found although the text differs.
    other = ask(runtime, clip, "refresh", context="other words")
    assert all(r.reuse.pairs_encoded == 0 for r in other.rounds)


def test_grid_keeps_pairs_and_official_keeps_the_system_prompt(
    runtime: Runtime, clip: Path
) -> None:
    grid = ask(runtime, clip, "grid")
    assert grid.rounds[1].reuse.pairs_encoded < grid.rounds[0].reuse.pairs_encoded
    runtime.clear_caches()
    official = ask(runtime, clip, "official")
    system = official.rounds[0].prompt.split("<|im_start|>user")[0]
    floor = len(runtime.engine.tokenizer.encode(system))
    assert all(r.reuse.tokens_reused >= floor for r in official.rounds[1:])


@pytest.mark.parametrize("strategy", ["official", "grid", "refresh", "append"])
def test_caches_do_not_change_a_token(runtime: Runtime, clip: Path, strategy: str) -> None:
    warm = ask(runtime, clip, strategy)
    rerun = ask(runtime, clip, strategy)
    runtime.clear_caches()
    cold = ask(runtime, clip, strategy)
    tokens = [[r.token_ids for r in answer.rounds] for answer in (warm, rerun, cold)]
    assert tokens[0] == tokens[1] == tokens[2]


# -- answers, events, stops -----------------------------------------------------------------


class Scripted:
    """Replaces what the model says: texts per round, through the engine's own sampling."""

    def __init__(self, runtime: Runtime, texts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
        tokenizer = runtime.engine.tokenizer
        self.script = [[*tokenizer.encode(t), max(tokenizer.eos_token_ids)] for t in texts]

        def choose(logits: Any, params: Any, *, round_index: int, position: int, **_: Any) -> Any:
            return self.script[round_index][position], -0.5

        choose_by(monkeypatch, choose)


def said(spans: str, answer: str = "B") -> str:
    return f"<think>x</think><answer>{answer}</answer><glue>{spans}</glue>"


def test_events_clue_and_answer(
    runtime: Runtime, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Scripted(runtime, [said("[(2, 5)] [0, 0, 0.5, 0.5]"), said("[(3, 4)]", "A"), "B"], monkeypatch)
    events = list(
        runtime.stream(
            clip,
            "which?",
            options=["red", "blue"],
            perception=PerceptionConfig(strategy="append", **LOOK),
        )
    )
    kinds = [event.type for event in events]
    assert kinds[0] == "round_started" and kinds[-2:] == ["round_finished", "answer"]
    assert kinds.count("round_finished") == kinds.count("round_started") == 3
    clue_at = next(i for i, e in enumerate(events) if e.type == "clue")
    assert clue_at < kinds.index("round_finished")  # known before the answer ends
    assert [e.value for e in events if e.type == "clue"] == [
        (2.0, 5.0),
        (0.0, 0.0, 0.5, 0.5),
        (3.0, 4.0),
    ]
    ready = events[-1]
    assert isinstance(ready, AnswerReady)
    answer = ready.answer
    assert (answer.text, answer.option, answer.option_index) == ("B", "B", 1)
    assert answer.rounds[1].plan.views[0].box[:2] == (0, 0)
    assert answer.rounds[1].plan.segments[0].box == answer.rounds[1].plan.views[0].box
    text = "".join(e.text for e in events if e.type == "token" and e.index == 0)
    assert text == answer.rounds[0].text


def test_a_constrained_clue_always_parses(
    runtime: Runtime, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("llguidance")
    opening = runtime.engine.tokenizer.encode("<answer>B</answer><glue>")

    def choose(logits: Any, params: Any, *, position: int, **_: Any) -> Any:
        """A model that opens the tag and then babbles."""
        babble = logits if position < len(opening) else logits + torch.randn(logits.shape) * 5
        return int(opening[position] if position < len(opening) else babble.argmax()), -0.5

    choose_by(monkeypatch, choose)
    arguments = {
        "assume_clues": None,
        "sampling": SamplingParams(max_tokens=400, stop=("</glue>",)),
    }
    for constrain in (True, False):
        config = PerceptionConfig(strategy="grid", max_rounds=2, constrain_clues=constrain, **LOOK)
        answer = ask(runtime, clip, "grid", perception=config, **arguments)
        clue = answer.rounds[0].clue
        problems = set(clue.problems) - {"<glue> is never closed"}  # the stop text closed it
        assert (clue.usable and not problems) == constrain


def test_no_clue_ends_and_the_answer_stands(
    runtime: Runtime, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Scripted(runtime, ["<answer>A</answer>"], monkeypatch)
    answer = ask(runtime, clip, "append", assume_clues=None, sampling=SamplingParams())
    assert (answer.stop_reason, answer.option, len(answer.rounds)) == ("no_clue", "A", 1)


def test_official_runs_all_rounds_without_a_clue(
    runtime: Runtime, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Scripted(runtime, ["nothing", "nothing", "B"], monkeypatch)
    answer = ask(runtime, clip, "official", assume_clues=None, sampling=SamplingParams())
    assert (answer.stop_reason, len(answer.rounds)) == ("max_rounds", 3)
    assert answer.rounds[0].frames == answer.rounds[1].frames


def test_a_stable_answer_ends_when_asked_for(
    runtime: Runtime, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Scripted(runtime, [said("[(2, 5)]"), said("[(3, 4)]"), said("[(3, 3.5)]")], monkeypatch)
    config = PerceptionConfig(strategy="append", stop_when_stable=True, **LOOK)
    answer = ask(
        runtime, clip, "append", perception=config, assume_clues=None, sampling=SamplingParams()
    )
    assert (answer.stop_reason, len(answer.rounds)) == ("answer_stable", 2)


def test_token_budget(checkpoint: Path, clip: Path) -> None:
    page_bytes = 2 * 3 * 16 * 2 * 16 * 4  # k and v, layers, tokens, heads, head dim, fp32
    config = EngineConfig(kv_bytes=40 * page_bytes)
    with Runtime.from_pretrained(checkpoint, engine=config) as runtime:
        look = LOOK | {"total_pixels": 30_000}
        answer = ask(
            runtime, clip, "append", perception=PerceptionConfig(strategy="append", **look)
        )
        assert answer.stop_reason == "token_budget" and 1 <= len(answer.rounds) < 3
        with pytest.raises(ValueError, match="prompt plus max_tokens must be <= 640 tokens"):
            ask(runtime, clip, "append", context="many words " * 300)


def test_timeout_and_closing_leave_the_runtime_usable(
    runtime: Runtime, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slowly(video: Any, *, deadline_seconds: Any, **more: Any) -> Any:
        return open_video(video, **more)

    with monkeypatch.context() as patch:  # as if it passed right after the opening
        patch.setattr("vtts_rt.rounds.prepare.open_video", slowly)
        late = ask(runtime, clip, "append", timeout_seconds=1e-9)
    assert (late.stop_reason, late.rounds, late.text) == ("timeout", [], "")
    stream = runtime.stream(clip, "which?", perception=PerceptionConfig(**LOOK), sampling=FORCED)
    while next(stream).type != "token":
        pass
    stream.close()
    assert not runtime._driver.call(lambda: runtime.engine.has_work)
    runtime.engine.check_integrity()
    assert len(ask(runtime, clip, "append").rounds) == 3


def test_a_seed_is_a_sample(runtime: Runtime, clip: Path) -> None:
    def tokens(seed: int, member: int = 0) -> list[int]:
        sampling = SamplingParams(temperature=1.0, seed=seed, max_tokens=8, ignore_eos=True)
        answer = ask(runtime, clip, "append", sampling=sampling, member=member)
        return [t for r in answer.rounds for t in r.token_ids]

    assert tokens(1) == tokens(1)
    assert tokens(1) != tokens(2)
    assert tokens(1) != tokens(1, member=1)


# -- inputs ---------------------------------------------------------------------------------


def test_arrays_images_bytes_and_lists(runtime: Runtime, clip: Path) -> None:
    array = np.random.default_rng(1).integers(0, 256, (20, 40, 60, 3), dtype=np.uint8)
    from_array = ask(runtime, array, "append", source_fps=4.0)
    assert from_array.videos[0].num_frames == 20
    from_bytes = ask(runtime, clip.read_bytes(), "append")
    assert [r.token_ids for r in from_bytes.rounds] == [
        r.token_ids for r in ask(runtime, clip, "append").rounds
    ]
    image = ask(runtime, array[0], "official", assume_clues=None)
    assert "<|image_pad|>" in image.rounds[0].prompt
    for strategy in ("official", "append"):
        both = ask(runtime, [clip, array[0]], strategy)
        assert len(both.videos) == 2 and both.rounds[0].prompt.count("_pad|>") >= 2
    part = ask(runtime, clip, "append", start_seconds=2.0, end_seconds=4.0)
    assert part.videos[0].num_frames == 16


def test_defaults_of_the_model_fill_what_was_not_passed(checkpoint: Path, clip: Path) -> None:
    (checkpoint / "vtts.json").write_text(
        '{"perception": {"strategy": "refresh", "sample_fps": 0.5, "max_rounds": 2},'
        ' "prompts": {"cue_look": " Hm?"}}'
    )
    try:
        with Runtime.from_pretrained(checkpoint) as runtime:
            config = runtime.perception(PerceptionConfig(max_rounds=1))
            assert (config.strategy, config.sample_fps, config.max_rounds) == ("refresh", 0.5, 1)
            assert runtime.perception(config) is config
            replaced = replace(PerceptionConfig(strategy="append"), max_rounds=3)
            assert runtime.perception(replaced).sample_fps == 0.5
            answer = runtime.ask(clip, "which?", sampling=FORCED, assume_clues=CLUES)
            assert answer.strategy == "refresh" and " Hm?" in answer.rounds[0].prompt
    finally:
        (checkpoint / "vtts.json").unlink()


def test_generate_and_score_agree(runtime: Runtime) -> None:
    completion = runtime.generate("hello", FORCED)
    assert runtime.score("hello", completion.token_ids) == pytest.approx(
        completion.logprobs, abs=1e-4
    )
    with pytest.raises(ValueError, match="text only"):
        runtime.generate(Prompt((ask_segment(),)))


def ask_segment() -> Any:
    from vtts_rt.types import PairRef, PixelBox, Segment

    return Segment((PairRef(0, "v", 0, 0, 0.0),), PixelBox(0, 0, 28, 28), (28, 28), GEOMETRY)


def test_batch_and_plan(runtime: Runtime, clip: Path) -> None:
    request = {
        "video": clip,
        "question": "which?",
        "perception": PerceptionConfig(strategy="append", **LOOK),
        "sampling": FORCED,
        "assume_clues": CLUES,
    }
    plan = runtime.plan(
        clip, "which?", perception=PerceptionConfig(strategy="append", **LOOK), max_tokens=6
    )
    assert runtime.stats()["frame_store"]["frames_decoded"] == 0  # nothing was decoded for it
    one, two = runtime.ask_batch([request, request])
    assert [r.token_ids for r in one.rounds] == [r.token_ids for r in two.rounds]
    assert plan["rounds"][0]["prompt_tokens"] == one.rounds[0].prompt_tokens
    assert plan["rounds"][0]["pairs"] == len(one.rounds[0].plan.segments)
    assert [r["exact"] for r in plan["rounds"]] == [True, False, False]
    assert runtime.stats()["prefix_tree"]["hits"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"question": "  "}, "question must be"),
        ({"options": ["a", " "]}, "options must be"),
        ({"options": "ab"}, "options must be a list"),
        ({"options": ["x"] * 27}, "options must be"),
        ({"timeout_seconds": 0}, "timeout_seconds must be > 0"),
        ({"assume_clues": [[[1, 2, 3]]]}, "assume_clues"),
        ({"video": []}, "video must be at least one"),
        ({"perception": {"max_rounds": 2}}, "perception must be a PerceptionConfig or None"),
        (
            {"perception": PerceptionConfig(strategy="official", stop_when_stable=True)},
            "stop_when_stable must be left out with strategy official",
        ),
        ({"video": "/nowhere.mp4"}, "open_video"),
        ({"video": "http://example.com/a.mp4"}, "open_video"),
    ],
)
def test_bad_arguments_are_one_clear_sentence(
    runtime: Runtime, clip: Path, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        runtime.ask(**{"video": clip, "question": "which?"} | arguments)


@pytest.mark.parametrize(
    ("device", "error"), [("cuda:0", RuntimeError), ("tpu", ValueError), ("cpu:x", ValueError)]
)
def test_bad_devices(checkpoint: Path, device: str, error: type[Exception]) -> None:
    if device.startswith("cuda") and torch.cuda.is_available():
        device = "cuda:99"
    with pytest.raises(error):
        Runtime.from_pretrained(checkpoint, device=device)
