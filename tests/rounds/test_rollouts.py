"""Rollout groups: what their members share, what ends one of them alone, and what a seed gives."""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from utils import CLUES, as_ask, held, told

from vtts_rt import Answer, Ask, BadMedia, BadRequest, Runtime, SamplingParams
from vtts_rt.errors import Aborted
from vtts_rt.models.registry import from_config
from vtts_rt.rounds.driver import Driver
from vtts_rt.rounds.results import AnswerReady
from vtts_rt.video import open_video

SAMPLING = SamplingParams(max_tokens=8, seed=5, ignore_eos=True)
ENDLESS = SamplingParams(max_tokens=3000, ignore_eos=True)


@pytest.fixture()
def runtime(exact_runtime: Runtime) -> Runtime:
    return exact_runtime


@pytest.fixture()
def ask(clips: list[Path]) -> Ask:
    return as_ask(clips[0], sampling=SAMPLING)


def spent(answers: list[Answer], counter: str) -> int:
    return sum(getattr(look.reuse, counter) for answer in answers for look in answer.rounds)


@pytest.mark.parametrize("exact_runtime", ["float32", "bfloat16"], indirect=True)
def test_a_group_opens_decodes_encodes_and_prefills_once(
    runtime: Runtime, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Any] = []
    monkeypatch.setattr(
        "vtts_rt.rounds.prepare.open_video", lambda v, **k: opened.append(v) or open_video(v, **k)
    )
    group = runtime.rollouts(ask, 5, group_id="one")
    assert (group.group_id, group.ask, group.errors) == ("one", ask, []) and len(opened) == 1
    answers = group.answers
    assert len({str(told(answer)) for answer in answers}) > 1
    first = [answer.rounds[0].reuse for answer in answers]
    assert sorted(r.tokens_prefilled for r in first)[:4] == [1, 1, 1, 1]
    # Members look at the same clue: what one fetches and encodes serves all.
    segments = [answers[0].rounds[index].plan.segments for index in range(3)]
    for index in range(3):
        encoded = [answer.rounds[index].reuse.pairs_encoded for answer in answers]
        assert sum(encoded) == len(segments[index])
    shown = {f for look in segments for s in look for f in s.frame_indices}
    store = runtime.stats()["frame_store"]
    assert spent(answers, "frames_decoded") <= len(shown)
    assert store["frames_decoded"] + store["frames_passing"] == store["frames"]  # none twice
    runtime.engine.check_integrity()
    runtime.clear_caches()
    assert told(runtime.ask(replace(ask, member=3))) == told(answers[3])
    runtime.clear_caches()
    again = asyncio.run(runtime.rollouts_async(ask, 5))
    assert [told(answer) for answer in again.answers] == [told(answer) for answer in answers]


def test_members_may_look_at_places_of_their_own(runtime: Runtime, ask: Ask) -> None:
    clues = [[[[2 * member, 2 * member + 2]], CLUES[1]] for member in range(3)]
    group = runtime.rollouts(ask, 3, assume_clues=clues)
    frames = [answer.rounds[1].frames for answer in group.answers]
    assert len(set(frames)) == 3
    pairs = {
        (s.frame_indices, s.box)
        for answer in group.answers
        for look in answer.rounds
        for s in look.plan.segments
    }
    assert spent(group.answers, "pairs_encoded") == len(pairs)
    alone = runtime.ask(replace(ask, member=2, assume_clues=clues[2]))
    assert told(alone) == told(group.answers[2])


def test_a_member_that_fails_loses_no_other(runtime: Runtime, ask: Ask) -> None:
    expected = [told(answer) for answer in runtime.rollouts(ask, 3).answers]
    seen: list[tuple[int, str]] = []

    def refuse(member: int, event: Any) -> None:
        seen.append((member, event.type))
        if member == 1 and event.type == "token":
            raise KeyError("no")

    group = runtime.rollouts(ask, 3, on_event=refuse)
    assert isinstance(group.members[1], KeyError) and group.errors == [group.members[1]]
    assert [told(answer) for answer in group.answers] == [expected[0], expected[2]]
    assert [kind for member, kind in seen if member == 0][-2:] == ["round_finished", "answer"]
    assert (1, "round_finished") not in seen
    assert not runtime.engine.has_work and not runtime._driver._admitted
    with pytest.raises(BadMedia):
        runtime.rollouts(replace(ask, videos=["/nowhere.mp4"]), 2)
    assert not runtime._driver._admitted


def test_a_deadline_ends_each_member_with_what_it_has(
    runtime: Runtime, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One member ends before its time, the other when it is up: it is when the first has ended."""
    now, passed = time.monotonic, [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now() + passed[0])

    hand_over = runtime._driver._hand_over

    def pass_time(request_id: int, output: Any) -> None:
        hand_over(request_id, output)
        if isinstance(output, AnswerReady):
            passed[0] = 1e6

    monkeypatch.setattr(runtime._driver, "_hand_over", pass_time)
    short = replace(ask, timeout_seconds=1e5, sampling=ENDLESS)
    begun = runtime._driver.submit_together

    def shorten(submitted: Any) -> None:
        """Member 0 has less to say."""
        submitted[0][1].sampling = replace(submitted[0][1].sampling, max_tokens=2)
        begun(submitted)

    monkeypatch.setattr(runtime._driver, "submit_together", shorten)
    group = runtime.rollouts(short, 2)
    assert [answer.stop_reason for answer in group.answers] == ["max_rounds", "timeout"]
    late = group.answers[1].rounds
    assert late[-1].finish_reason == "timeout" and len(late[0].token_ids) > 2


def test_a_cancelled_group_leaves_nothing(runtime: Runtime, ask: Ask) -> None:
    async def main() -> None:
        begun = asyncio.Event()
        loop = asyncio.get_running_loop()

        def told(member: int, event: Any) -> None:
            if event.type == "token":
                loop.call_soon_threadsafe(begun.set)

        endless = replace(ask, sampling=ENDLESS)
        task = asyncio.create_task(runtime.rollouts_async(endless, 4, on_event=told))
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with held(runtime, "token"):
        asyncio.run(main())
    assert not runtime._driver._admitted
    runtime._driver.call_idle(lambda: None)
    assert not runtime.engine.has_work
    runtime.engine.check_integrity()


def test_a_group_never_mixes_two_versions(
    runtime: Runtime, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An update that comes while members are handed over does not come between them."""
    others = from_config(runtime.engine.model.config, 7).export()
    queue, begun, asked = Driver._queue, threading.Event(), threading.Event()

    def slowly(self: Driver, run: Any) -> None:
        queue(self, run)
        if threading.current_thread() is threading.main_thread():
            begun.set()
            assert asked.wait(60)  # the update asks for its turn meanwhile
        else:
            asked.set()

    monkeypatch.setattr(Driver, "_queue", slowly)

    def update(*arguments: Any, **more: Any) -> threading.Thread:
        begun.clear()
        asked.clear()
        thread = threading.Thread(
            target=lambda: begun.wait(60) and runtime.update_weights(*arguments, **more)
        )
        thread.start()
        return thread

    updating = update(others)
    group = runtime.rollouts(ask, 4)
    updating.join()
    assert [answer.weights_version for answer in group.answers] == [0] * 4
    assert group.weights_version == 0
    after = runtime.rollouts(ask, 4)
    assert after.weights_version == 1 and told(after.answers[0]) != told(group.answers[0])
    aborting = update({}, in_flight="abort")
    aborted = runtime.rollouts(replace(ask, sampling=ENDLESS), 3)
    aborting.join()
    assert [type(error) for error in aborted.errors] == [Aborted] * 3
    assert aborted.weights_version is None


def test_arguments_of_rollouts(runtime: Runtime, ask: Ask) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"ask": "clip.mp4"}, "ask must be an Ask"),
        *(
            ({"num_answers": n}, "num_answers must be a whole number >= 2")
            for n in (1, 0, True, "2")
        ),
        ({"ask": replace(ask, member=0)}, "member must be None, as the function sets it"),
        (
            {"ask": replace(ask, sampling=SamplingParams(temperature=0.0))},
            "temperature must be above 0, or the members would all say the same, got 0.0",
        ),
        ({"group_id": 3}, "group_id must be a text"),
        ({"assume_clues": "ab"}, "assume_clues must be a list or None"),
        ({"assume_clues": [CLUES]}, "assume_clues must be 2 lists, one a member, or None"),
        ({"on_event": 3}, "on_event must be a function or None"),
    ]
    for change, message in wrong:
        with pytest.raises(BadRequest, match=f"^rollouts: {message}"):
            runtime.rollouts(**({"ask": ask, "num_answers": 2} | change))
    with pytest.raises(BadRequest, match="assume_clues must be None or a list with a clue a round"):
        runtime.rollouts(ask, 2, assume_clues=[CLUES, [3]])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="^rollouts: unexpected argument 'members'"):
        runtime.rollouts(ask, 2, members=3)  # type: ignore[call-arg]
    with pytest.raises(BadRequest, match="^rollouts: ask must be an Ask"):
        asyncio.run(runtime.rollouts_async(3, 2))  # type: ignore[arg-type]
    assert runtime.stats()["frame_store"]["queries"] == 0
    assert np.isfinite(torch.tensor(told(runtime.rollouts(ask, 2).answers[0])[0][1])).all()
