"""Many questions at once: threads, coroutines, groups, faults, new weights, fetching ahead."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clip_writer import write_video
from utils import LOOK, choose_by, request, told

from vtts_rt import EngineConfig, PerceptionConfig, Runtime, RuntimeConfig, SamplingParams
from vtts_rt.rounds.results import Answer
from vtts_rt.video import open_video
from vtts_rt.video.pyav import PyavSource

ENGINE = EngineConfig(kv_bytes=1 << 26)

in_dtypes = pytest.mark.parametrize("exact_runtime", ["float32", "bfloat16"], indirect=True)


@pytest.fixture()
def runtime(exact_runtime: Runtime) -> Runtime:
    return exact_runtime


@in_dtypes
def test_a_batch_answers_as_each_question_alone(runtime: Runtime, clips: list[Path]) -> None:
    requests = [
        request(clip, strategy, question=question)
        for clip in clips
        for strategy in ("official", "grid", "refresh", "append")
        for question in ("which?", "where is it?")
    ]
    together = runtime.ask_batch(requests)
    stats = runtime.stats()["scheduler"]
    assert stats["steps"] < 3 * 16 * 6 / 2  # passes were shared
    runtime.engine.check_integrity()
    for arguments, answer in zip(requests, together, strict=True):
        runtime.clear_caches()
        assert told(runtime.ask(**arguments)) == told(answer)


def test_requests_for_one_video_decode_and_encode_it_once(
    runtime: Runtime, clips: list[Path]
) -> None:
    answers = runtime.ask_batch([request(clips[0], question=f"number {i}?") for i in range(6)])
    frames = {f for a in answers for r in a.rounds for f in r.frames}
    store = runtime.stats()["frame_store"]
    assert store["frames_decoded"] + store["frames_passing"] == store["frames"]  # none twice
    assert 0 < store["frames_decoded"] <= len(frames) <= store["frames"]
    pairs = {(s.frame_indices, s.box) for a in answers for r in a.rounds for s in r.plan.segments}
    assert sum(r.reuse.pairs_encoded for a in answers for r in a.rounds) == len(pairs)


@in_dtypes
def test_requests_share_the_kv_of_a_first_look_that_stands_first(
    runtime: Runtime, clips: list[Path]
) -> None:
    many = {"sample_fps": 8.0, "min_pixels": 3136, "total_pixels": 1_000_000}
    config = PerceptionConfig(strategy="append", text_first=False, **many)
    requests = [request(clips[0], perception=config, question=f"number {i}?") for i in range(4)]
    answers = runtime.ask_batch(requests)
    look = answers[0].rounds[0].plan.segments
    vision = sum(segment.num_tokens for segment in look)
    prefilled = sorted(answer.rounds[0].reuse.tokens_prefilled for answer in answers)
    assert prefilled[-1] - prefilled[-2] > vision  # one for all
    for arguments, answer in zip(requests, answers, strict=True):
        runtime.clear_caches()
        assert told(runtime.ask(**arguments)) == told(answer)


@in_dtypes
def test_later_rounds_draft_from_earlier_ones(runtime: Runtime, clips: list[Path]) -> None:
    arguments = request(clips[0], sampling=SamplingParams(max_tokens=24, ignore_eos=True))
    answer = runtime.ask(**arguments)
    assert sum(r.reuse.tokens_drafted for r in answer.rounds) > 0
    plain_config = EngineConfig(kv_bytes=1 << 26, draft_tokens=0)
    engine = runtime.engine
    with Runtime(engine.model, engine.tokenizer, engine=plain_config) as plain:
        assert told(plain.ask(**arguments)) == told(answer)


def test_one_bad_request_loses_no_other(runtime: Runtime, clips: list[Path]) -> None:
    requests = [request(clips[0]), request("/nowhere.mp4"), request(clips[1])]
    good, bad, other = runtime.ask_batch(requests, return_exceptions=True)
    assert isinstance(bad, ValueError) and len(good.rounds) == len(other.rounds) == 3
    with pytest.raises(ValueError, match="open_video"):
        runtime.ask_batch(requests)
    assert runtime.ask_batch([]) == []


def test_a_decoder_that_fails_within_a_round(
    runtime: Runtime, clips: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = PyavSource.read

    with open_video(clips[1]) as source:
        broken = source.metadata.video_id

    def dying(self: PyavSource, *indices: Any) -> Any:
        for item in read(self, *indices):
            if self.metadata.video_id == broken and item[0] > 20:
                raise OSError("disk gone")
            yield item

    monkeypatch.setattr(PyavSource, "read", dying)
    good, bad = runtime.ask_batch([request(clips[0]), request(clips[1])], return_exceptions=True)
    assert len(good.rounds) == 3
    assert isinstance(bad, OSError) and "disk gone" in str(bad)
    runtime.engine.check_integrity()


def test_a_callback_that_raises_ends_its_question_alone(
    runtime: Runtime, clips: list[Path]
) -> None:
    def refuse(event: Any) -> None:
        if event.type == "token":
            raise KeyError("no")

    outcomes: list[Any] = [None, None]

    def ask(place: int, **more: Any) -> None:
        try:
            outcomes[place] = runtime.ask(**request(clips[place]), **more)
        except KeyError as error:
            outcomes[place] = error

    threads = [
        threading.Thread(target=ask, args=(0,), kwargs={"on_event": refuse}),
        threading.Thread(target=ask, args=(1,)),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert isinstance(outcomes[0], KeyError) and len(outcomes[1].rounds) == 3
    assert not runtime.engine.has_work


# -- coroutines -------------------------------------------------------------------------------


def test_coroutines_run_together_and_can_be_cancelled(runtime: Runtime, clips: list[Path]) -> None:
    async def main() -> tuple[list[Any], Answer]:
        long = request(clips[1], sampling=SamplingParams(max_tokens=400, ignore_eos=True))
        slow = asyncio.create_task(runtime.ask_async(**long))
        quick = asyncio.create_task(runtime.ask_async(**request(clips[0])))
        kinds = [event.type async for event in runtime.stream_async(**request(clips[0], "refresh"))]
        answer = await quick
        slow.cancel()
        with pytest.raises(asyncio.CancelledError):
            await slow
        return kinds, answer

    kinds, answer = asyncio.run(main())
    assert kinds[0] == "round_started" and kinds[-2:] == ["round_finished", "answer"]
    assert told(answer) == told(runtime.ask(**request(clips[0])))
    assert not runtime.engine.has_work
    runtime.engine.check_integrity()


def test_errors_reach_the_coroutine(runtime: Runtime) -> None:
    with pytest.raises(ValueError, match="open_video"):
        asyncio.run(runtime.ask_async(**request("/nowhere.mp4")))


# -- ends -------------------------------------------------------------------------------------


def test_closing_fails_what_is_in_work(checkpoint: Path, clips: list[Path]) -> None:
    runtime = Runtime.from_pretrained(checkpoint, engine=EngineConfig(kv_bytes=1 << 26))
    long = request(clips[0], sampling=SamplingParams(max_tokens=3000, ignore_eos=True))
    stream = runtime.stream(**long)
    while next(stream).type != "token":
        pass
    runtime.close()
    with pytest.raises(RuntimeError, match="closed"):
        for _ in stream:
            pass
    with pytest.raises(RuntimeError, match="it is closed; make a new one"):
        runtime.ask(**request(clips[0]))


class Unlike(Exception):
    """An error that `copy.copy` cannot make again of its args."""

    def __init__(self, what: str, more: str) -> None:
        super().__init__(f"{what} {more}")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (AssertionError("books do not balance"), "books do not balance"),
        (Unlike("books", "do not balance"), "Unlike: books do not balance"),
    ],
)
def test_an_engine_fault_fails_each_request_with_an_error_of_its_own(
    runtime: Runtime,
    clips: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    told: str,
) -> None:
    def broken() -> Any:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(runtime.engine._scheduler, "schedule", broken)
        outcomes = runtime.ask_batch([request(c) for c in clips], return_exceptions=True)
    assert [str(outcome) for outcome in outcomes] == [told] * 2
    assert outcomes[0] is not outcomes[1] and error not in outcomes
    assert len(runtime.ask(**request(clips[0])).rounds) == 3


# -- weights ----------------------------------------------------------------------------------


def test_new_weights_are_never_mixed_with_old_ones(runtime: Runtime, clips: list[Path]) -> None:
    arguments = request(clips[0], sampling=SamplingParams(max_tokens=40, ignore_eos=True))
    old = runtime.ask(**arguments)
    name = "model.language_model.layers.0.mlp.down_proj.weight"
    state = runtime.engine.model.export()
    answers: list[Answer] = []
    # One asks while the weights change: all its rounds see the old ones.
    started = threading.Event()
    requester = threading.Thread(
        target=lambda: answers.append(
            runtime.ask(**arguments, on_event=lambda event: started.set())
        )
    )
    requester.start()
    assert started.wait(60)
    runtime.update_weights({name: -state[name]})
    requester.join()
    assert told(answers[0]) == told(old)
    new = runtime.ask(**arguments)
    assert told(new) != told(old)
    # The vision tower is as it was: its features live on, the keys and values do not.
    assert sum(r.reuse.pairs_encoded for r in new.rounds) == 0
    assert new.rounds[0].reuse.tokens_reused == 0
    runtime.update_weights({name: state[name]})
    assert told(runtime.ask(**arguments)) == told(old)
    vision = "model.visual.blocks.0.mlp.down_proj.weight"
    runtime.update_weights({vision: -state[vision]})
    assert runtime.ask(**arguments).rounds[0].reuse.pairs_reused == 0


def test_an_update_can_abort_and_refuses_what_does_not_fit(
    runtime: Runtime, clips: list[Path]
) -> None:
    long = request(clips[0], sampling=SamplingParams(max_tokens=2000, ignore_eos=True))
    name = "model.language_model.norm.weight"
    weight = runtime.engine.model.export()[name]
    stream = runtime.stream(**long)
    while next(stream).type != "token":
        pass
    runtime.update_weights({name: weight}, in_flight="abort")
    with pytest.raises(RuntimeError, match="aborted for an update"):
        for _ in stream:
            pass
    for tensors, message in (
        ({"nothing.weight": weight}, "named as in the checkpoint"),
        ({name: weight[:3]}, "shape must be"),
    ):
        with pytest.raises(ValueError, match=message):
            runtime.update_weights(tensors)
    with pytest.raises(ValueError, match="in_flight must be drain or abort"):
        runtime.update_weights({}, in_flight="now")  # type: ignore[arg-type]
    assert torch.equal(runtime.engine.model.export()[name], weight)


# -- fetching ahead ---------------------------------------------------------------------------


@pytest.mark.parametrize("ahead", [True, False])
def test_frames_of_a_clue_are_fetched_before_the_answer_ends(
    checkpoint: Path, clips: list[Path], monkeypatch: pytest.MonkeyPatch, ahead: bool
) -> None:
    config = RuntimeConfig(speculative_fetch=ahead)
    # By-products of the first round would leave nothing to fetch.
    monkeypatch.setattr("vtts_rt.rounds.scheduler.finer_frames", lambda *_: {})
    with Runtime.from_pretrained(checkpoint, engine=ENGINE, config=config) as runtime:
        tokenizer = runtime.engine.tokenizer
        text = "<answer>B</answer><glue>[(2, 5)]</glue> and so on and on and on"
        script = [[*tokenizer.encode(t), max(tokenizer.eos_token_ids)] for t in (text, "B")]
        decoded_at: list[int] = []

        def choose(logits: Any, params: Any, *, round_index: int, position: int, **_: Any) -> Any:
            if round_index == 0 and position == len(script[0]) - 1:
                deadline = time.monotonic() + 10
                store = runtime._resources.store
                while ahead and store.frames_decoded == first and time.monotonic() < deadline:
                    time.sleep(0.01)
                decoded_at.append(store.frames_decoded)
            return script[round_index][position], -0.5

        plan = runtime.plan(
            clips[0], "which?", perception=PerceptionConfig(strategy="append", **LOOK)
        )
        first = plan["rounds"][0]["frames"]
        choose_by(monkeypatch, choose)
        arguments = request(clips[0], assume_clues=None, sampling=SamplingParams())
        answer = runtime.ask(**arguments)
        assert (decoded_at[0] > first) == ahead
        assert (runtime.stats()["frame_store"]["frames_guessed"] > 0) == ahead
        # They count in the round that shows them.
        shown = set(answer.rounds[1].frames) - set(answer.rounds[0].frames)
        assert answer.rounds[0].reuse.frames_decoded == first
        assert answer.rounds[1].reuse.frames_decoded == len(shown) > 0


def test_finer_frames_are_kept_as_the_decoder_passes_them(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "one_gop.mp4"
    still = np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8)
    frames = (np.roll(still, 2 * i, 1) for i in range(160))
    write_video(path, frames, source_fps=16.0, gop=250, b_frames=2)
    answers = {}
    for ahead in (True, False):
        config = RuntimeConfig(speculative_fetch=ahead)
        with Runtime.from_pretrained(checkpoint, engine=ENGINE, config=config) as runtime:
            answers[ahead] = runtime.ask(**request(path, "append")).rounds
            assert (runtime.stats()["frame_store"]["frames_passing"] > 0) == ahead
    decoded: set[int] = set()
    for with_it, without in zip(answers[True], answers[False], strict=True):
        assert with_it.token_ids == without.token_ids and with_it.frames == without.frames
        new = set(without.frames) - decoded
        assert without.reuse.frames_decoded == len(new)
        assert without.reuse.frames_reused == len(set(without.frames) & decoded)
        decoded |= new
    later = {a: sum(r.reuse.frames_codec_decoded for r in answers[a][1:]) for a in answers}
    assert later[True] < later[False]
    assert answers[True][1].reuse.frames_decoded == 0
