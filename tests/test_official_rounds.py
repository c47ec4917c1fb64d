"""`official` in rounds: the published clue rule decides what the next round shows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from test_runtime import Scripted, said
from utils import LOOK, tiny_checkpoint

from vtts_rt import PerceptionConfig, Runtime
from vtts_rt.bench.model import moving_frames
from vtts_rt.perception.clue import parse_clue
from vtts_rt.video.writer import write_video


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    write_video(path, moving_frames(64, (64, 96)), source_fps=8)
    return path


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runtime]:
    with Runtime.from_pretrained(tiny_checkpoint(tmp_path_factory.mktemp("tiny"))) as runtime:
        yield runtime


def test_official_reads_clues_by_the_published_rule(
    runtime: Runtime, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told when the tag closes; a notation that only the lenient parser reads is uniform."""
    answers = [said("[(2, 3), [1, 9, 9]]"), said("[(2, 3), (4, 5.5)]"), "B"]
    assert parse_clue(answers[0]).spans == ((2, 3),)
    Scripted(runtime, answers, monkeypatch)
    config = PerceptionConfig(strategy="official", **LOOK)
    events = list(runtime.stream(clip, "which?", perception=config))
    first, second, third = events[-1].answer.rounds
    assert first.clue.spans == () and second.frames == first.frames != third.frames
    assert second.plan.notes[0].startswith("<glue> is no list of (start, end): ValueError")
    assert second.as_dict()["clue"] == {"spans": [[2, 3], [4, 5.5]], "boxes": []}
    told = [i for i, event in enumerate(events) if event.type == "clue"]
    assert [events[i].value for i in told] == [(2, 3), (4, 5.5)]
    tokens = [e.text for e in events[: told[0]] if e.type == "token" and e.index == 1]
    assert "".join(tokens).endswith("</glue>")


@pytest.mark.parametrize("sticky", [False, True])
def test_a_round_without_a_clue_forgets_or_keeps_the_last(
    runtime: Runtime, clip: Path, monkeypatch: pytest.MonkeyPatch, sticky: bool
) -> None:
    Scripted(runtime, [said("[(2, 3)]"), "nothing", "B"], monkeypatch)
    config = PerceptionConfig(strategy="official", sticky_clues=sticky, **LOOK)
    first, second, third = runtime.ask(clip, "which?", perception=config).rounds
    assert second.frames != first.frames
    assert third.frames == (second if sticky else first).frames
    assert third.clue.spans == () and [r.span.end_seconds for r in second.plan.regions] == [3]
    assert bool(third.plan.regions) == sticky
