"""Dialects that go on by further turns, end to end on a random model: what is shown and reused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from test_runtime import Scripted, logits_of
from utils import LOOK, copy_config, request

from vtts_rt import EngineConfig, PerceptionConfig, Runtime, SamplingParams
from vtts_rt.engine.sequence import GenerationRequest
from vtts_rt.perception.clue import Clue
from vtts_rt.perception.region import RawRegion


@pytest.fixture()
def runtime(checkpoint: Path) -> Iterator[Runtime]:
    """Without drafts, which may have computed the token that is pending when a round ends."""
    config = EngineConfig(kv_bytes=1 << 26, draft_tokens=0)
    with Runtime.from_pretrained(checkpoint, engine=config) as runtime:
        yield runtime


def crop(start: float, end: float) -> str:
    given = f'{{"video_path": "/etc/passwd", "start_time": {start}, "end_time": {end}}}'
    return f'<think>x</think><tool_call>{{"name": "crop_video", "arguments": {given}}}</tool_call>'


def zoom(start: float, end: float) -> str:
    return f'<think>x</think><video_zoom>{{"segment": [{start}, {end}], "fps": 2}}</video_zoom>'


FINAL = "<think>y</think><answer>B</answer>"
# Dialect -> what the model says, the frames that it is shown for it, what a frame looks like.
ROUNDS: dict[str, tuple[list[str], list[list[int]], str]] = {
    "longvt": ([crop(2, 5), crop(3, 6), FINAL], [[16, 24, 32], [24, 32, 40]], "{image}"),
    "videozoomer": (
        [zoom(2, 3.5), zoom(3, 4), FINAL],
        [[16, 20, 24], [24, 28]],
        "<frame{number}_time{seconds:.2f}s>{image}",
    ),
}


@pytest.mark.parametrize("dialect", ROUNDS)
def test_three_rounds_pay_only_for_what_is_new(
    dialect: str, runtime: Runtime, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts, frames, form = ROUNDS[dialect]
    Scripted(runtime, texts, monkeypatch)
    sent: list[GenerationRequest] = []
    add = runtime.engine.add

    def spy(request: GenerationRequest) -> int:
        sent.append(request)
        return add(request)

    monkeypatch.setattr(runtime.engine, "add", spy)
    config = PerceptionConfig(dialect=dialect, **LOOK)
    events = list(runtime.stream(clip, "which?", options=["red", "blue"], perception=config))
    answer = events[-1].answer
    assert (answer.text, answer.option, answer.stop_reason) == ("B", "B", "max_rounds")
    assert answer.as_dict()["dialect"] == dialect
    _, *later = answer.rounds
    assert [list(dict.fromkeys(result.frames)) for result in later] == frames
    for result, text in zip(answer.rounds, texts, strict=True):
        assert text.startswith(result.text) and result.finish_reason == "stop"
    # Told before the answer ends, and only once.
    told = [event.value for event in events if event.type == "clue"]
    assert told == [result.clue.spans[0] for result in answer.rounds[:2]]

    image = "<|vision_start|><|image_pad|><|vision_end|>"
    shown: set[int] = set()
    for index, result in enumerate(later, 1):
        before = answer.rounds[index - 1]
        turn = "".join(
            form.format(number=i, seconds=frame / 8, image=image)
            for i, frame in enumerate(frames[index - 1])
        )
        assert result.prompt.startswith(
            f"<|im_end|>\n<|im_start|>user\n<tool_response>\n{turn}\n</tool_response>"
        )
        assert result.prompt.endswith("<|im_end|>\n<|im_start|>assistant\n")
        # All earlier tokens are found, but for the one whose KV was still pending.
        start = before.prompt_tokens + len(before.token_ids)
        assert result.reuse.tokens_reused == start - 1
        assert result.reuse.tokens_prefilled + start - 1 == result.prompt_tokens
        kept = start - (dialect == "longvt")  # an end token is written by the next turn
        new = sent[index].prompt
        due = new.num_text_tokens(kept, len(new.token_ids)) + (kept == start)
        assert result.reuse.text_tokens_prefilled == due
        # A frame that was shown before is not encoded again; pairs of the first look are others.
        asked = set(frames[index - 1])
        assert result.reuse.pairs_encoded == len(asked - shown)
        earlier = sum(len(r.plan.segments) for r in answer.rounds[:index])
        assert result.reuse.pairs_reused == earlier + len(asked & shown)
        shown |= asked
    runtime.engine.check_integrity()


@pytest.mark.parametrize("dialect", ROUNDS)
def test_forced_rounds_are_one_pass_over_the_whole(
    dialect: str, runtime: Runtime, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[GenerationRequest] = []
    add = runtime.engine.add

    def spy(request: GenerationRequest) -> int:
        sent.append(request)
        return add(request)

    monkeypatch.setattr(runtime.engine, "add", spy)
    config = PerceptionConfig(dialect=dialect, **LOOK)
    last = runtime.ask(**request(clip, perception=config)).rounds[-1]
    assert last.index == 2 and all(segment.is_image for segment in last.plan.segments)
    whole = sent[-1].prompt.extended(last.token_ids)
    expected = logits_of(runtime.engine.model, clip, whole)[len(sent[-1].prompt) - 1 : -1]
    got = expected.log_softmax(-1)[range(6), last.token_ids]
    assert torch.allclose(torch.tensor(last.logprobs), got, atol=1e-4)


def test_an_answer_without_a_request_is_the_last(
    runtime: Runtime, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Scripted(runtime, [FINAL], monkeypatch)
    config = PerceptionConfig(dialect="longvt", **LOOK)
    answer = runtime.ask(clip, "which?", perception=config)
    assert (len(answer.rounds), answer.stop_reason, answer.text) == (1, "no_clue", "B")
    prompt = answer.rounds[0].prompt
    assert "crop_video" in prompt and "<glue>" not in prompt


def test_a_recipe_picks_the_dialect(
    checkpoint: Path, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a question another one; the wording goes with it."""
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    recipe = {"vtts_rt": {"perception": {"dialect": "videozoomer"}}}
    copy_config(checkpoint, tmp_path, lambda config: config | recipe)
    with Runtime.from_pretrained(tmp_path) as runtime:
        Scripted(runtime, [FINAL], monkeypatch)
        one = {**LOOK, "max_rounds": 1}
        own = runtime.ask(clip, "which?", perception=PerceptionConfig(**one))
        other = runtime.ask(clip, "which?", perception=PerceptionConfig(dialect="r1.5", **one))
    assert (own.dialect, own.strategy) == ("videozoomer", "append")
    assert "<video_zoom>" in own.rounds[0].prompt
    assert (other.dialect, other.strategy) == ("r1.5", "official")
    assert "<video_zoom>" not in other.rounds[0].prompt


def test_stop_texts_of_a_request_and_of_the_checkpoint_stay(
    checkpoint: Path, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "stop_strings": ["END"]}))
    sent: list[GenerationRequest] = []
    with Runtime.from_pretrained(tmp_path) as runtime:
        add = runtime.engine.add
        monkeypatch.setattr(runtime.engine, "add", lambda r: sent.append(r) or add(r))
        config = PerceptionConfig(dialect="videozoomer", **{**LOOK, "max_rounds": 1})
        for stop in (None, "X", ()):
            sampling = SamplingParams(stop=stop, max_tokens=1)
            runtime.ask(clip, "which?", perception=config, sampling=sampling)
    own = "</video_zoom>"
    assert [r.sampling.stop for r in sent] == [("END", own), ("X", own), (own,)]


def test_a_later_round_costs_at_most_the_longest_reply(runtime: Runtime, clip: Path) -> None:
    config = PerceptionConfig(dialect="videozoomer", **LOOK)
    cost = runtime.plan(clip, "which?", perception=config)["rounds"]
    whole = RawRegion(span=(0.0, 1e6), num_frames=1000)
    clues = [Clue(spans=((0.0, 1e6),), regions=(whole,))] * 2
    answer = runtime.ask(**request(clip, perception=config, assume_clues=clues))
    for later, result in zip(cost[1:], answer.rounds[1:], strict=True):
        segments = result.plan.segments
        tokens = sum(segment.num_tokens for segment in segments)
        found = (later["frames"], later["pairs"], later["vision_tokens"])
        assert found == (len(segments), len(segments), tokens) == (16, 16, 16 * 6)
