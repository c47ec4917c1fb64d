"""What a run passes over and what it tries again: groups that failed, were aborted or not given."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from feed_tools import FakeVideos, data_sets, use

from vtts_rt import Aborted, Ask, BadRequest, RolloutDataFeed, RolloutGroup
from vtts_rt.data.rows import DataSet
from vtts_rt.rollout import engine as engine_module
from vtts_rt.rollout.engine import RolloutEngine
from vtts_rt.rollout.journal import RolloutJournal, read_journal
from vtts_rt.rollout.rows import RolloutRow

ROWS = [2, 1, 3]  # questions about each video


def row(group_id: str, member: int) -> RolloutRow:
    ids = np.arange(3, dtype=np.int64)
    mask = ids > 0
    logprobs = np.where(mask, -0.5, np.nan)
    return RolloutRow(
        *(ids, mask, logprobs, np.stack([ids] * 3)), group_id=group_id, rollout_id=member
    )


@pytest.fixture(autouse=True)
def videos() -> Iterator[FakeVideos]:
    """No video is a file, and members are texts or errors, texts as good as answers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            engine_module,
            "rows_of",
            lambda group, scores: [
                row(group.group_id, n) for n, text in enumerate(group.members) if text == "said"
            ],
        )
        yield use(patch, FakeVideos())


@pytest.fixture()
def sets() -> list[DataSet]:
    return data_sets(ROWS)


class Sampler:
    """members(group id): those of a group, in an order of ends that is no group's own."""

    def __init__(self, members: Callable[[str], Any] = lambda group_id: ("said", "said")) -> None:
        self.members, self.begun, self.random = members, list[str](), random.Random(3)

    async def rollouts_async(self, ask: Ask, num_answers: int, *, group_id: str) -> RolloutGroup:
        self.begun.append(group_id)
        for _ in range(self.random.randrange(6)):
            await asyncio.sleep(0)
        members = self.members(group_id)
        if isinstance(members, Exception):
            raise members
        return RolloutGroup(group_id, ask, members)


def run(engine: RolloutEngine, feed: Any, most: int = 1 << 30) -> list[str]:
    """The groups that one run gives out, at most so many."""

    async def main() -> list[str]:
        found = []
        async with aclosing(engine.run(feed)) as groups:
            async for finished in groups:
                found.append(finished.group.group_id)
                if len(found) == most:
                    break
        return found

    return asyncio.run(main())


def epochs(engine: RolloutEngine, feed: RolloutDataFeed, num: int = 2) -> list[str]:
    found = []
    while feed.epoch < num:
        found += run(engine, feed)
    return found


def kept(path: Path) -> list[str]:
    return [record.group_id for record in read_journal(path)]


def test_a_resumed_run_tries_again_what_failed_in_any_epoch(
    sets: list[DataSet], tmp_path: Path, videos: FakeVideos
) -> None:
    path = tmp_path / "journal"

    def some_fail(group_id: str) -> Any:
        if group_id == "0.1.1":  # all of it, as a value
            return KeyError("no frame"), KeyError("no frame")
        return OSError("no such video") if group_id == "1.0.0" else ("said", "said")

    with RolloutJournal(path) as journal:
        whole = epochs(RolloutEngine(Sampler(some_fail), 2, journal=journal), RolloutDataFeed(sets))
    assert len(whole) == 2 * sum(ROWS) and len(kept(path)) == len(whole) - 2
    for healed, again in (("1.0.0", ["0.1.1", "1.0.0"]), ("0.1.1", ["0.1.1"]), ("", [])):
        videos.opened.clear()
        feed = RolloutDataFeed(sets)
        sampler = Sampler(lambda name, healed=healed: ("said",) if name == healed else some_fail(name))  # type: ignore[misc]  # fmt: skip  # noqa: E501
        with RolloutJournal(path, resume=True) as journal:
            assert sorted(epochs(RolloutEngine(sampler, 2, journal=journal), feed)) == again
        assert sorted(sampler.begun) == again
        # Nothing is read of what is in the journal: both failures are about the first video.
        assert feed.stats()["items_delivered"] == len(again)
        assert videos.opened == ({0: len(again)} if again else {})
    assert sorted(kept(path)) == sorted(whole)


@pytest.mark.parametrize("journaled", [True, False])
@pytest.mark.parametrize("most", [1, 2, 4, 5])
def test_what_a_left_run_did_not_give_is_given_by_the_next(
    sets: list[DataSet], tmp_path: Path, journaled: bool, most: int
) -> None:
    """Aborted groups above all; nothing is given twice."""
    path, feed = tmp_path / "journal", RolloutDataFeed(sets, shuffle_seed=5)
    journal = RolloutJournal(path) if journaled else None
    engine = RolloutEngine(Sampler(), 2, max_groups=3, journal=journal)
    given = []
    while feed.epoch < 2:
        given += run(engine, feed, most)
    assert len(set(given)) == len(given)
    if journal is None:
        assert len(given) == 2 * sum(ROWS)
    else:  # some ended just before their run was left: they are in the journal
        journal.close()
        assert set(given) <= set(kept(path)) and len(kept(path)) == 2 * sum(ROWS)


def test_a_left_feed_stands_at_the_first_group_that_was_not_given(sets: list[DataSet]) -> None:
    first = asyncio.Event()

    class Slow(Sampler):
        async def rollouts_async(self, *args: Any, group_id: str) -> RolloutGroup:
            if group_id == "0.1.1":
                await first.wait()
            return await super().rollouts_async(*args, group_id=group_id)

    feed = RolloutDataFeed(sets)
    assert sorted(run(RolloutEngine(Slow(), 2, max_groups=2), feed, 4)) == ["0.0.0", "0.2.2", "0.3.3", "0.4.4"]  # fmt: skip  # noqa: E501
    assert feed.state_dict()["rows_passed"] == 1
    other = RolloutDataFeed(sets)
    other.load_state_dict(feed.state_dict())
    assert len(run(RolloutEngine(Sampler(), 2), other)) == 5


@pytest.mark.parametrize(
    ("members", "is_complete"),
    [
        (("said", "said"), True),
        (("said", KeyError("x")), True),  # it would fail again
        (("said", Aborted("close")), False),
        ((KeyError("x"), KeyError("y")), False),
        (("silent", "silent"), False),  # out of time before the end of a round
    ],
)
def test_which_groups_are_kept(members: Any, is_complete: bool, tmp_path: Path) -> None:
    path = tmp_path / "journal"

    async def main() -> Any:
        with RolloutJournal(path) as journal:
            engine = RolloutEngine(Sampler(lambda _: members), 2, journal=journal)
            return [finished async for finished in engine.run([("g", Ask("clip.mp4", "which?"))])]

    (finished,) = asyncio.run(main())
    assert finished.is_complete == is_complete
    records = list(read_journal(path))
    assert len(records) == is_complete
    for record in records:
        assert record.errors == ({} if members[1] == "said" else {1: "KeyError: 'x'"})
    if not is_complete:
        assert finished.failure in ("close", "'x'", "no member finished a round in time")


def test_a_journal_of_another_feed_is_refused(sets: list[DataSet], tmp_path: Path) -> None:
    with RolloutJournal(tmp_path / "journal") as journal:
        engine = RolloutEngine(Sampler(), 2, journal=journal)
        run(engine, RolloutDataFeed(sets), 1)
        feed = RolloutDataFeed(sets, shuffle_seed=1)
        with pytest.raises(BadRequest, match="shuffle_seed of the state must be 1, got None"):
            run(engine, feed)
        assert feed.state_dict() == RolloutDataFeed(sets, shuffle_seed=1).state_dict()


def test_arguments_are_checked_before_a_group() -> None:
    wrong: dict[str, Any] = {"timeout_seconds": -1, "perception": "append", "sampling": 3, "score": 1}  # fmt: skip  # noqa: E501
    for name, value in wrong.items():
        with pytest.raises(BadRequest, match=f"^RolloutEngine: {name} must be"):
            RolloutEngine(Sampler(), 2, **{name: value})


def test_a_thousand_groups_behind_a_slow_one() -> None:
    """The place of each is noted in constant time: the places behind the slow one are not gone
    through at every end."""
    passed = 0

    class Place(engine_module._Place):
        @property
        def given(self) -> bool:
            nonlocal passed
            passed += 1
            return self.__dict__.get("is_given", False)

        @given.setter
        def given(self, value: bool) -> None:
            self.__dict__["is_given"] = value

    async def main() -> int:
        gate, num = asyncio.Event(), 0

        class Slow(Sampler):
            async def rollouts_async(self, *args: Any, group_id: str) -> RolloutGroup:
                if group_id == "0":
                    await gate.wait()
                return await super().rollouts_async(*args, group_id=group_id)

        asks = [(str(number), Ask("clip.mp4", "which?")) for number in range(1000)]
        async with aclosing(RolloutEngine(Slow(), 2).run(asks)) as groups:
            async for _ in groups:
                num += 1
                if num == 999:
                    gate.set()
        return num

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_module, "_Place", Place)
        assert asyncio.run(main()) == 1000
    assert passed < 4000
