"""Fetching ahead in whole questions: the embedded model, the shipped clip, a source that is slow.

The source lets the frames of the first look through and holds all others back until it is opened.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from utils import choose_by, told

import vtts_rt
from vtts_rt import EngineConfig, PerceptionConfig, Runtime, RuntimeConfig, SamplingParams
from vtts_rt.rounds.results import Answer
from vtts_rt.video.prefetch import PREFETCH_BATCH
from vtts_rt.video.pyav import PyavSource
from vtts_rt.video.store import StoreProvider

ASSETS = Path(vtts_rt.__file__).parent / "assets"
PATIENCE_SECONDS = 60
KV_BYTES = 1 << 26


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.001)


@pytest.fixture(scope="module")
def tiny() -> Iterator[Runtime]:
    with Runtime.from_pretrained("tiny", engine=EngineConfig(kv_bytes=KV_BYTES)) as runtime:
        yield runtime


@pytest.fixture()
def runtime(tiny: Runtime) -> Iterator[Runtime]:
    with another(tiny) as runtime:
        yield runtime


def another(tiny: Runtime, *, ahead: bool = True) -> Runtime:
    engine = tiny.engine
    return Runtime(
        engine.model,
        engine.tokenizer,
        templates=tiny._resources.templates,
        engine=EngineConfig(kv_bytes=KV_BYTES),
        config=RuntimeConfig(speculative_fetch=ahead),
    )


def question(strategy: Any = "append", rounds: int = 2, **more: Any) -> dict[str, Any]:
    """The arguments of `ask` for the shipped clip's question."""
    about = json.loads((ASSETS / "clip.json").read_text())
    return {
        "video": ASSETS / "clip.mp4",
        "question": about["question"],
        "options": about["options"],
        "perception": PerceptionConfig(strategy=strategy, max_rounds=rounds),
        "sampling": SamplingParams(temperature=0.0, max_tokens=96),
        **more,
    }


class SlowSource:
    """What becomes of reading and guessing while it is held back.

    at_once: frames that are never held back. started: a read is held back now. open: nothing is,
    from now on. guesses: (provider, frames) in order, without those that were there. cancelled:
    frames cancelled up to then, after each guess. read: (name of the thread, frame) of every frame
    asked of the decoder.
    """

    def __init__(self, patch: pytest.MonkeyPatch, at_once: Sequence[int]) -> None:
        self.at_once = set(at_once)
        self.started, self.open = threading.Event(), threading.Event()
        self.guesses: list[tuple[StoreProvider, list[int]]] = []
        self.cancelled: list[int] = []
        self.read: list[tuple[str, int]] = []
        read, guess = PyavSource.read, StoreProvider.guess

        def slow_read(source: PyavSource, indices: Sequence[int], passing: Any = ()) -> Any:
            if not self.at_once.issuperset(indices):
                self.started.set()
                assert self.open.wait(PATIENCE_SECONDS)
            name = threading.current_thread().name
            self.read.extend((name, i) for i in indices)
            yield from read(source, indices, passing)

        def noted_guess(provider: StoreProvider, video: int, indices: Sequence[int]) -> None:
            wanted = provider._wanted[video]
            self.guesses.append((provider, provider._store.absent(wanted.source, indices)))
            guess(provider, video, indices)
            self.cancelled.append(provider._store.ahead.frames_cancelled)

        patch.setattr(PyavSource, "read", slow_read)
        patch.setattr(StoreProvider, "guess", noted_guess)
        # By-products of the first look would leave little to guess.
        patch.setattr("vtts_rt.rounds.scheduler.finer_frames", lambda *_: {})


@pytest.fixture()
def slow(tiny: Runtime, monkeypatch: pytest.MonkeyPatch) -> Iterator[SlowSource]:
    first = tiny.ask(**question(rounds=1)).rounds[0].frames
    source = SlowSource(monkeypatch, first)
    yield source
    source.open.set()


def at_token(
    patch: pytest.MonkeyPatch,
    position: int,
    act: Callable[[], object],
    script: Sequence[int] = (),
) -> None:
    """Call `act` before the token at `position` of the first round is chosen; that round's tokens
    are those of `script` where there is one."""
    from vtts_rt.ops.sampling import sample_token

    def choose(logits: Any, params: Any, *, round_index: int, position: int, **more: Any) -> Any:
        if round_index == 0 and position == last:
            act()
        if round_index == 0 and script:
            return script[position], -0.5
        return sample_token(logits, params, round_index=round_index, position=position, **more)

    last = position
    choose_by(patch, choose)


@pytest.fixture(scope="module")
def expected(tiny: Runtime) -> Answer:
    """The answer of two rounds when nothing is fetched ahead."""
    with another(tiny, ahead=False) as runtime:
        answer = runtime.ask(**question())
        counts = runtime.stats()["frame_store"]
    assert counts["frames_guessed"] == counts["frames_passing"] == 0
    assert all(r.reuse.frames_guessed == 0 for r in answer.rounds)
    assert answer.rounds[1].reuse.frames_decoded > PREFETCH_BATCH
    return answer


# -- right guesses ----------------------------------------------------------------------------


def test_frames_of_a_clue_are_read_while_its_answer_is_written(
    runtime: Runtime, expected: Answer, slow: SlowSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_tokens = len(expected.rounds[0].token_ids)
    begun: list[bool] = []
    at_token(
        monkeypatch,
        num_tokens - 1,
        lambda: begun.append(slow.started.wait(PATIENCE_SECONDS)),
    )
    prefetch = StoreProvider.prefetch

    def asked(provider: StoreProvider, video: int, indices: Sequence[int]) -> None:
        prefetch(provider, video, indices)
        if not slow.at_once.issuperset(indices):
            slow.open.set()  # not before the second round has asked for its frames

    monkeypatch.setattr(StoreProvider, "prefetch", asked)
    answer = runtime.ask(**question())
    assert begun and all(begun) and told(answer) == told(expected)
    new = expected.rounds[1].reuse.frames_decoded
    reuse = answer.rounds[1].reuse
    assert (reuse.frames_guessed, reuse.frames_guessed_used) == (new, new)
    assert reuse.frames_decoded == new and answer.rounds[0].reuse.frames_guessed == 0
    assert reuse.frames_reused == expected.rounds[1].reuse.frames_reused
    counts = runtime.stats()["frame_store"]
    assert counts["frames_guessed"] == counts["frames_guessed_used"] == new
    assert counts["frames_guessed_late"] == new  # right, and all of them held back
    assert counts["frames_cancelled"] == counts["frames_dropped"] == 0


def test_frames_that_came_in_time_are_read_once(
    runtime: Runtime, expected: Answer, slow: SlowSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow.open.set()
    num_tokens = len(expected.rounds[0].token_ids)
    ahead = runtime._resources.store.ahead
    at_token(monkeypatch, num_tokens - 1, lambda: wait_for(lambda: not ahead._working))
    answer = runtime.ask(**question())
    assert told(answer) == told(expected)
    new = expected.rounds[1].reuse.frames_decoded
    counts = runtime.stats()["frame_store"]
    assert (counts["frames_guessed_used"], counts["frames_guessed_late"]) == (new, 0)
    later = [(name, i) for name, i in slow.read if i not in slow.at_once]
    assert len(later) == new and all(name.startswith("prefetch") for name, _ in later)


def test_a_group_guesses_alike_and_reads_once(
    runtime: Runtime, expected: Answer, slow: SlowSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    guess = StoreProvider.guess

    def opening_guess(provider: StoreProvider, video: int, indices: Sequence[int]) -> None:
        guess(provider, video, indices)
        if len({id(p) for p, _ in slow.guesses}) == 4:
            slow.open.set()

    monkeypatch.setattr(StoreProvider, "guess", opening_guess)
    answers = runtime.ask_batch([question() | {"member": member} for member in range(4)])
    assert [told(answer) for answer in answers] == [told(expected)] * 4
    new = expected.rounds[1].reuse.frames_decoded
    counts = runtime.stats()["frame_store"]
    assert counts["frames_guessed"] == 4 * new  # each its own, read for the first of them
    assert counts["frames_decoded"] == len(slow.at_once) + new == len(slow.read)
    assert new <= counts["frames_guessed_used"] <= 4 * new
    by_round = [answer.rounds[1].reuse for answer in answers]
    assert sum(r.frames_guessed for r in by_round) == counts["frames_guessed"]
    assert sum(r.frames_guessed_used for r in by_round) == counts["frames_guessed_used"]


@pytest.mark.parametrize("strategy", ["official", "grid", "refresh", "append"])
def test_answers_do_not_depend_on_it(tiny: Runtime, strategy: str) -> None:
    with another(tiny) as ahead, another(tiny, ahead=False) as plain:
        with_it, without = (r.ask(**question(strategy, 3)) for r in (ahead, plain))
        assert told(with_it) == told(without)
        assert [r.frames for r in with_it.rounds] == [r.frames for r in without.rounds]
        counts = plain.stats()["frame_store"]
        assert counts["frames_guessed"] == counts["frames_passing"] == 0
        ahead._resources.store.check_integrity()


def test_a_guess_that_fails_is_only_a_guess(
    runtime: Runtime, expected: Answer, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures: list[int] = []

    def broken(*_: Any) -> None:
        failures.append(1)
        raise MemoryError("no room to look ahead")

    monkeypatch.setattr("vtts_rt.video.store.StoreProvider.guess", broken)
    assert told(runtime.ask(**question())) == told(expected) and failures


# -- wrong guesses ----------------------------------------------------------------------------


def test_a_second_clue_cancels_what_only_the_first_would_have_shown(
    runtime: Runtime, slow: SlowSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "<answer>B</answer><glue>[(2.0, 3.0)] [(9.0, 12.0)]</glue>"
    tokenizer = runtime.engine.tokenizer
    script = [*tokenizer.encode(text), max(tokenizer.eos_token_ids)]
    monkeypatch.setattr("vtts_rt.video.prefetch.PREFETCH_BATCH", 2)
    # A thread is at the first two frames before the second clue comes.
    between = len(tokenizer.encode(text[: text.index("9.0")]))
    at_token(monkeypatch, between, lambda: slow.started.wait(PATIENCE_SECONDS), script)
    # Without a margin the first span is short enough for a finer look than both together.
    perception = PerceptionConfig(strategy="append", max_rounds=2, focus_margin_cells=0.0)
    stream = runtime.stream(**question(perception=perception))
    while next(stream).type != "round_finished":
        pass
    (provider, first), (same, second) = slow.guesses
    assert provider is same
    gone = set(first[2:]) - set(second)
    assert gone and slow.cancelled == [0, len(gone)]
    slow.open.set()
    *_, last = stream
    reuse = last.answer.rounds[1].reuse
    assert reuse.frames_guessed == len({*first, *second})
    used = {*first, *second}.intersection(last.answer.rounds[1].frames)
    assert reuse.frames_guessed_used == len(used) < reuse.frames_guessed
    assert gone.isdisjoint(i for _, i in slow.read) and gone.isdisjoint(used)
    runtime._resources.store.check_integrity()


# -- ends -------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["closed stream", "timeout", "closed runtime"])
def test_however_a_question_ends_what_waits_is_cancelled(
    tiny: Runtime,
    expected: Answer,
    slow: SlowSource,
    monkeypatch: pytest.MonkeyPatch,
    end: str,
) -> None:
    ended = threading.Event()
    late = False

    def hold() -> None:
        nonlocal late
        assert slow.started.wait(PATIENCE_SECONDS)
        late = end == "timeout"
        wait_for(lambda: late or ended.is_set() or runtime._driver._closed)

    at_token(monkeypatch, len(expected.rounds[0].token_ids) - 1, hold)
    clock = SimpleNamespace(
        monotonic=lambda: time.monotonic() + (1e6 if late else 0.0), perf_counter=time.perf_counter
    )
    monkeypatch.setattr("vtts_rt.engine.engine.time", clock)
    runtime = another(tiny)
    ahead = runtime._resources.store.ahead
    stream = runtime.stream(**question(timeout_seconds=1e5))
    while next(stream).type != "clue":
        pass
    assert slow.started.wait(PATIENCE_SECONDS)
    closer = threading.Thread(target=runtime.close)
    if end == "closed stream":
        stream.close()
        ended.set()
    elif end == "timeout":
        *_, last = stream
        assert last.answer.stop_reason == "timeout"
    else:
        closer.start()
    wait_for(lambda: not ahead._waiting)
    new = expected.rounds[1].reuse.frames_decoded
    counts = ahead.stats()
    assert counts["frames_guessed"] == new and counts["frames_guessed_used"] == 0
    assert counts["frames_cancelled"] == new - PREFETCH_BATCH
    slow.open.set()
    if end == "closed runtime":
        closer.join(PATIENCE_SECONDS)
        assert not closer.is_alive() and not ahead._working
        with pytest.raises(RuntimeError, match="closed"):
            list(stream)
        return
    late = False
    assert told(runtime.ask(**question())) == told(expected)  # whatever was begun
    runtime._resources.store.check_integrity()
    runtime.close()
