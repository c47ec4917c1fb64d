"""RolloutEngine: groups in flight, their order, phases between them, and what ends a run."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from utils import LOOK, as_ask, told

from vtts_rt import (
    Ask,
    BadMedia,
    BadRequest,
    PerceptionConfig,
    RolloutDataFeed,
    RolloutGroup,
    Runtime,
    SamplingParams,
)
from vtts_rt.models.registry import from_config
from vtts_rt.rollout.engine import FinishedGroup, RolloutEngine
from vtts_rt.rollout.journal import RolloutJournal, read_journal
from vtts_rt.rollout.rows import Score

SAMPLING = SamplingParams(max_tokens=4, ignore_eos=True)


@pytest.fixture()
def runtime(exact_runtime: Runtime) -> Runtime:
    return exact_runtime


@pytest.fixture()
def asks(clips: list[Path]) -> list[tuple[str, Ask]]:
    return [
        (f"g{i}", as_ask(clips[i % 2], sampling=replace(SAMPLING, seed=i), question=f"number {i}?"))
        for i in range(4)
    ]


@pytest.fixture(scope="module")
def manifest(clips: list[Path]) -> Path:
    folder = clips[0].parent
    rows = [{"video": f"{'ab'[i % 2]}.mp4", "question": f"which {i}?"} for i in range(6)]
    (folder / "rows.json").write_text(json.dumps(rows))
    entry = {"media_type": "video", "task_type": "gqa", "visual_base": "", "json_path": "rows.json"}
    (folder / "manifest.json").write_text(json.dumps({"set": entry}))
    return folder / "manifest.json"


def run(engine: RolloutEngine, feed: Any, most: int = 1 << 30) -> list[FinishedGroup]:
    """The first groups to end."""

    async def main() -> list[FinishedGroup]:
        found = []
        async with aclosing(engine.run(feed)) as groups:
            async for finished in groups:
                found.append(finished)
                if len(found) == most:
                    break
        return found

    return asyncio.run(main())


def said(found: list[FinishedGroup]) -> dict[str, Any]:
    return {f.group.group_id: [told(answer) for answer in f.group.answers] for f in found}


class Stub:
    """A sampler without a model: `act` decides what becomes of a group."""

    def __init__(self, act: Callable[[str], Any]) -> None:
        self.act, self.begun, self.calls = act, [], []
        self.running = self.most = 0

    async def rollouts_async(self, ask: Ask, num_answers: int, *, group_id: str) -> RolloutGroup:
        self.begun.append(group_id)
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await self.act(group_id)
            return RolloutGroup(group_id, ask, (KeyError(group_id),) * num_answers)
        finally:
            self.running -= 1

    def update_weights(self, tensors: Any, *, finish: bool = True) -> None:
        self.calls.append(("update", self.running))

    def sleep(self) -> None:
        self.calls.append(("sleep", self.running))

    def wake(self) -> None:
        self.calls.append(("wake", self.running))


def entries(count: int) -> list[tuple[str, Ask]]:
    return [(f"g{number}", Ask("clip.mp4", "which?")) for number in range(count)]


def test_groups_do_not_depend_on_order_or_on_those_beside_them(
    runtime: Runtime, asks: list[tuple[str, Ask]]
) -> None:
    together = said(run(RolloutEngine(runtime, 3), asks))
    runtime.clear_caches()
    one_by_one = said(run(RolloutEngine(runtime, 3, max_groups=1), asks[::-1]))
    assert together == one_by_one and len({str(group) for group in together.values()}) == 4
    assert list(one_by_one) == [name for name, _ in asks[::-1]]

    async def slowly() -> AsyncIterator[tuple[str, Ask]]:
        for entry in asks[:2]:
            yield entry

    assert said(run(RolloutEngine(runtime, 3), slowly())) == {k: together[k] for k in ("g0", "g1")}
    runtime.engine.check_integrity()


def test_a_group_that_fails_is_a_value(
    runtime: Runtime, asks: list[tuple[str, Ask]], tmp_path: Path
) -> None:
    asks[1] = ("broken", Ask("/nowhere.mp4", "which?"))
    seen: list[str] = []

    def score(group: RolloutGroup, item: object) -> list[Score | None]:
        seen.append(group.group_id)
        return [Score(float(member), {"own": 1.0}) for member in range(2)]

    path = tmp_path / "journal"
    with RolloutJournal(path) as journal:
        engine = RolloutEngine(runtime, 2, score=score, journal=journal)
        found = {finished.group.group_id: finished for finished in run(engine, asks)}
    broken = found.pop("broken")
    assert [type(e) for e in broken.group.errors] == [BadMedia] * 2 and broken.rows == []
    assert sorted(seen) == sorted(found) == ["g0", "g2", "g3"]
    for finished in found.values():
        assert [row.reward for row in finished.rows] == [0.0, 1.0]
        assert [row.weights_version for row in finished.rows] == [0, 0]
    journaled = {record.group_id: record for record in read_journal(path)}
    assert journaled.keys() == found.keys()  # the broken one is tried again
    for name, record in journaled.items():
        assert [r.as_dict() for r in record.rows] == [r.as_dict() for r in found[name].rows]
    with RolloutJournal(path, resume=True) as journal:
        again = run(RolloutEngine(runtime, 2, journal=journal), asks)
    assert [finished.group.group_id for finished in again] == ["broken"]


def test_a_feed_goes_on_where_a_run_was_left(
    runtime: Runtime, manifest: Path, tmp_path: Path
) -> None:
    """Rows before the first unfinished one are not even decoded again."""
    look = runtime.perception(PerceptionConfig(strategy="append", max_rounds=2, **LOOK))

    def feed() -> RolloutDataFeed:
        return RolloutDataFeed(manifest, frames=look, shuffle_seed=1)

    def engine(journal: RolloutJournal | None = None) -> RolloutEngine:
        more: Any = {"perception": look, "sampling": SAMPLING, "max_groups": 1}
        return RolloutEngine(runtime, 2, journal=journal, **more)

    expected = said(run(engine(), feed()))
    assert len(expected) == 6
    path, first = tmp_path / "journal", feed()
    with RolloutJournal(path) as journal:
        part = run(engine(journal), first, most=4)
        assert all(f.item is not None and f.item.row.question == f.group.ask.question for f in part)
    done = [record.group_id for record in read_journal(path)]
    assert 4 <= len(done) < 6
    second = feed()
    with RolloutJournal(path, resume=True) as journal:
        both = engine(journal)
        rest = run(both, second)
        assert run(both, second, most=1)[0].item.epoch == 1  # type: ignore[union-attr]
    assert second.stats()["items_delivered"] - 6 <= 6 - len(done)
    assert len(rest) == 6 - len(done)
    assert {**said(part), **said(rest)}.items() <= expected.items()
    assert {f.group.group_id for f in rest} | set(done) == set(expected)
    with (
        pytest.raises(ValueError, match="shuffle_seed of the state must be 2, got 1"),
        RolloutJournal(path, resume=True) as journal,
    ):
        run(engine(journal), RolloutDataFeed(manifest, frames=look, shuffle_seed=2))
    with pytest.raises(BadRequest, match="batch_size of the feed must be None, got 2"):
        run(engine(), RolloutDataFeed(manifest, frames=look, batch_size=2))


def test_as_many_groups_are_in_flight_as_may_be() -> None:
    gate = {f"g{number}": asyncio.Event() for number in range(7)}
    stub = Stub(lambda name: gate[name].wait())

    async def main() -> list[str]:
        ended = []
        async with aclosing(RolloutEngine(stub, 2, max_groups=3).run(iter(entries(7)))) as groups:
            waiting = asyncio.ensure_future(anext(groups))
            while len(stub.begun) < 3:
                await asyncio.sleep(0)
            gate["g1"].set()
            ended.append((await waiting).group.group_id)
            # Others begin while the consumer is busy.
            while len(stub.begun) < 4:
                await asyncio.sleep(0)
            for event in gate.values():
                event.set()
            ended += [finished.group.group_id async for finished in groups]
        return ended

    ended = asyncio.run(main())
    assert ended[0] == "g1" and sorted(ended) == sorted(gate) and stub.most == 3


def test_a_run_that_is_left_aborts_what_is_in_flight(
    runtime: Runtime, asks: list[tuple[str, Ask]]
) -> None:
    closed: list[bool] = []

    def feed() -> Iterator[tuple[str, Ask]]:
        try:
            yield "quick", asks[0][1]
            for name, ask in asks:
                long = SamplingParams(max_tokens=2000, ignore_eos=True)
                yield name, replace(ask, sampling=long)
        finally:
            closed.append(True)

    (only,) = run(RolloutEngine(runtime, 2, max_groups=2), feed(), most=1)
    assert only.group.group_id == "quick" and closed == [True]
    assert not runtime._driver._admitted
    runtime._driver.call_idle(lambda: None)
    assert not runtime.engine.has_work


def test_errors_of_feed_and_scores_end_the_run(
    runtime: Runtime, asks: list[tuple[str, Ask]]
) -> None:
    def broken() -> Iterator[Any]:
        yield asks[0]
        raise OSError("disk gone")

    def score(group: RolloutGroup, item: object) -> Any:
        raise ValueError("reward 'x' must be finite")

    with pytest.raises(OSError, match="disk gone"):
        run(RolloutEngine(runtime, 2), broken())
    with pytest.raises(ValueError, match="reward 'x'"):
        run(RolloutEngine(runtime, 2, score=score), asks)
    for wrong in ([asks[0], asks[0]], [asks[0][1]], [("a", "b")], [(3, asks[0][1])], [None]):
        with pytest.raises(
            BadRequest, match="^RolloutEngine: (group_id|an entry of the feed) must"
        ):
            run(RolloutEngine(runtime, 2), wrong)
    for arguments in ({"num_answers": 1}, {"max_groups": 0}, {"journal": "path"}):
        (name,) = arguments
        with pytest.raises(BadRequest, match=f"^RolloutEngine: {name} must be"):
            RolloutEngine(runtime, **({"num_answers": 2} | arguments))  # type: ignore[arg-type]
    with pytest.raises(BadRequest, match="^RolloutEngine: temperature must be above 0"):
        RolloutEngine(runtime, 2, sampling=SamplingParams(temperature=0.0))
    assert not runtime._driver._admitted


def test_no_group_begins_while_the_sampler_sleeps() -> None:
    async def short(name: str) -> None:
        await asyncio.sleep(0.001)

    stub = Stub(short)

    async def main() -> None:
        engine = RolloutEngine(stub, 2, max_groups=2)
        async with aclosing(engine.run(entries(12))) as groups:
            await anext(groups)
            async with engine.asleep():
                begun = len(stub.begun)
                await engine.update_weights({})
                await asyncio.sleep(0.02)
                assert len(stub.begun) == begun < 12 and stub.running == 0
            assert len([finished async for finished in groups]) == 11

    asyncio.run(main())
    assert stub.calls == [("sleep", 0), ("update", 0), ("wake", 0)]


def test_a_sleep_that_is_cancelled_is_undone() -> None:
    gate = asyncio.Event()
    stub = Stub(lambda name: gate.wait())

    async def main() -> int:
        engine = RolloutEngine(stub, 2, max_groups=1)

        async def phase() -> None:
            async with engine.asleep():
                raise AssertionError("a group is in flight")

        async with aclosing(engine.run(entries(3))) as groups:
            first = asyncio.ensure_future(anext(groups))
            while not stub.begun:
                await asyncio.sleep(0)
            sleeping = asyncio.create_task(phase())
            await asyncio.sleep(0)
            sleeping.cancel()
            with pytest.raises(asyncio.CancelledError):
                await sleeping
            gate.set()
            await first
            return len([finished async for finished in groups])

    assert asyncio.run(main()) == 2


def test_new_weights_come_between_groups(runtime: Runtime, asks: list[tuple[str, Ask]]) -> None:
    """Sleeping or not, no group mixes two versions, and each is what its version gives."""
    others = from_config(runtime.engine.model.config, 7).export()
    asks = [(f"{i}.{name}", ask) for i in range(2) for name, ask in asks]

    async def main() -> list[FinishedGroup]:
        engine = RolloutEngine(runtime, 2, max_groups=2)
        found = []
        async with aclosing(engine.run(asks)) as groups:
            found.append(await anext(groups))
            names = sorted(others)
            await engine.update_weights({n: others[n] for n in names[:9]}, finish=False)
            async with engine.asleep():
                await engine.update_weights({n: others[n] for n in names[9:]})
            async for finished in groups:
                found.append(finished)
                if len(found) == 6:
                    await engine.update_weights({names[0]: others[names[0]]})
        return found

    found = asyncio.run(main())
    versions = [finished.group.weights_version for finished in found]
    assert versions[0] == 0 and set(versions) >= {0, 1} and len(found) == 8
    by_version: dict[Any, Any] = {}
    for finished in found:
        rows = {row.weights_version for row in finished.rows}
        assert rows == {finished.group.weights_version}
        name = finished.group.group_id.partition(".")[2]
        content = [told(answer) for answer in finished.group.answers]
        key = name, finished.group.weights_version == 0
        assert by_version.setdefault(key, content) == content
    assert np.isfinite(versions).all()
