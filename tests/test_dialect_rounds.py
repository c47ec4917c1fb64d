"""Dialects that go on by further turns, end to end on a random model: what is shown and reused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_runtime import Scripted, logits_of
from utils import LOOK, copy_config, request

from vtts_rt import EngineConfig, PerceptionConfig, Runtime, SamplingParams
from vtts_rt.config import RUNNING_DIALECTS
from vtts_rt.engine.sequence import GenerationRequest
from vtts_rt.perception.clue import Clue
from vtts_rt.perception.dialect import DIALECTS
from vtts_rt.perception.region import RawRegion
from vtts_rt.types import FULL_BOX, Box


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


def call(name: str, arguments: str) -> str:
    return f'<tool_call>{{"name": "{name}", "arguments": {arguments}}}</tool_call>'


FINAL = "<think>y</think><answer>B</answer>"
SPAN = '{"start_time": 2, "end_time": 5}'
SEEK = '{"query": "a card", "start_time": 2, "end_time": 5, "num_frames": 4}'
HALF = '{"bbox_2d": [0.5, 0, 1, 1], '


@dataclass
class Sample:
    """What a model says in its rounds, the frames that it is shown for each request, what a frame
    looks like in the prompt, whether a tool gives the look back, and which part of the frames it
    holds, as fractions."""

    texts: list[str]
    frames: list[list[int]]
    form: str = "{image}"
    tool: bool = True
    boxes: list[Box] = field(default_factory=list)


ROUNDS = {
    "longvt": Sample([crop(2, 5), crop(3, 6), FINAL], [[16, 24, 32], [24, 32, 40]]),
    "videozoomer": Sample(
        [zoom(2, 3.5), zoom(3, 4), FINAL],
        [[16, 20, 24], [24, 28]],
        "<frame{number}_time{seconds:.2f}s>{image}",
    ),
    "video-zoom-in": Sample([call("video_zoom_in_tool", SPAN), FINAL], [[16, 24, 32]]),
    "timesearch-r": Sample([call("seek_video_frames", SEEK), FINAL], [[16, 22, 28, 34]]),
    "conan": Sample(
        ["<think>x</think><clip>00:00:02-00:00:05</clip><answer></answer>", FINAL],
        [[17, 20, 23, 27, 29, 33, 36, 39]],  # 16, 24 and 32 are shown in the first look
        tool=False,
    ),
    "framethinker": Sample(
        [
            "<action>choose frames between 16 and 40</action>",
            "<action>get frame number at time 00:03</action>",
            "<action>output answer: B</action>",
        ],
        [[16, 18, 20, 23, 25, 27, 29, 31, 33, 36, 38, 40], [24]],
        "frame {index}:{image}",
        tool=False,
    ),
    "pixel-reasoner": Sample(
        [
            call("select_frames", '{"target_frames": [3, 5]}'),
            call("crop_image_normalized", HALF + '"target_image": 2}'),
            FINAL,
        ],
        [[16, 32], [16]],
        boxes=[FULL_BOX, Box(0.5, 0, 1, 1)],
    ),
    "deepeyes": Sample(
        [call("image_zoom_in_tool", '{"bbox_2d": [112, 0, 224, 112]}'), FINAL],
        [[0]],
        boxes=[Box(0.5, 0, 1, 1)],
    ),
    "mini-o3": Sample(
        [
            f'<grounding>{HALF}"source": "original_image"}}</grounding>',
            f'<grounding>{HALF}"source": "observation_1"}}</grounding>',
            FINAL,
        ],
        [[0], [0]],
        tool=False,
        boxes=[Box(0.5, 0, 1, 1), Box(0.75, 0, 1, 1)],
    ),
}


def test_every_dialect_that_runs_has_a_sample() -> None:
    assert {*ROUNDS, "r1.5"} == {*RUNNING_DIALECTS}


@pytest.mark.parametrize("dialect", ROUNDS)
def test_rounds_pay_only_for_what_is_new(
    dialect: str, runtime: Runtime, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = ROUNDS[dialect]
    script = Scripted(runtime, sample.texts, monkeypatch)
    sent: list[GenerationRequest] = []
    add = runtime.engine.add
    monkeypatch.setattr(runtime.engine, "add", lambda r: sent.append(r) or add(r))  # type: ignore[func-returns-value]
    config = PerceptionConfig(dialect=dialect, max_rounds=len(sample.texts), **LOOK)
    video = clip
    if dialect in ("deepeyes", "mini-o3"):
        video = tmp_path / "image.png"
        pixels = np.random.default_rng(0).integers(0, 256, (112, 224, 3), np.uint8)
        Image.fromarray(pixels).save(video)
    options = ["red", "blue"]
    events = list(runtime.stream(video, "which?", options=options, perception=config))
    answer = events[-1].answer
    assert (answer.text, answer.option, answer.stop_reason) == ("B", "B", "max_rounds")
    assert answer.as_dict()["dialect"] == dialect
    first, *later = answer.rounds
    assert DIALECTS[dialect].request.opening in first.prompt
    assert [list(dict.fromkeys(result.frames)) for result in later] == sample.frames
    for result, text in zip(answer.rounds, sample.texts, strict=True):
        assert text.startswith(result.text) and result.finish_reason == "stop"
    # Told before the answer ends, and only once.
    told = [event.value for event in events if event.type == "clue" and event.kind == "span"]
    assert told == [span for result in answer.rounds for span in result.clue.spans]
    boxes = [region.box for result in answer.rounds for region in result.regions]
    assert boxes == (sample.boxes or [FULL_BOX] * len(later))

    image = "<|vision_start|><|image_pad|><|vision_end|>"
    shown: set[tuple[int, Box]] = set()
    for index, result in enumerate(later, 1):
        before = answer.rounds[index - 1]
        frames, box = sample.frames[index - 1], boxes[index - 1]
        turn = "".join(
            sample.form.format(number=i, index=frame, seconds=frame / 8, image=image)
            for i, frame in enumerate(frames)
        )
        if dialect == "timesearch-r":
            times = ", ".join(f"{frame / 8:.1f}s" for frame in frames)
            turn = f"Here are selected frames. They are located at {times}.\n{turn}"
        if sample.tool:
            turn = f"<tool_response>\n{turn}\n</tool_response>"
        assert result.prompt.startswith(f"<|im_end|>\n<|im_start|>user\n{turn}")
        assert result.prompt.endswith("<|im_end|>\n<|im_start|>assistant\n")
        # All earlier tokens are found, but for the one whose KV was still pending.
        start = before.prompt_tokens + len(before.token_ids)
        assert result.reuse.tokens_reused == start - 1
        assert result.reuse.tokens_prefilled + start - 1 == result.prompt_tokens
        # An end token is written by the next turn, unless a stop text ended the last one.
        kept = start - (not DIALECTS[dialect].stop)
        new = sent[index].prompt
        due = new.num_text_tokens(kept, len(new.token_ids)) + (kept == start)
        assert result.reuse.text_tokens_prefilled == due
        # A frame that was shown before is not encoded again; pairs of the first look are others.
        asked = {(frame, box) for frame in frames}
        assert result.reuse.pairs_encoded == len(asked - shown)
        earlier = sum(len(r.plan.segments) for r in answer.rounds[:index])
        assert result.reuse.pairs_reused == earlier + len(asked & shown)
        shown |= asked
    assert len(script.script) == len(answer.rounds)
    runtime.engine.check_integrity()


@pytest.mark.parametrize("dialect", ["longvt", "videozoomer"])
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
