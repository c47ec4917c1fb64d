"""RolloutEngine: rollout groups of a feed, several in flight, given out as they end.

async with aclosing(engine.run(feed)) as groups:
    async for finished in groups: ...
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections import deque
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Callable,
    Container,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeAlias

from torch import Tensor

from vtts_rt.checks import Rule, check, is_whole
from vtts_rt.data.feed import RolloutDataFeed
from vtts_rt.data.frames import RolloutItem
from vtts_rt.errors import Aborted
from vtts_rt.rollout.journal import GroupRecord, RolloutJournal, errors_of
from vtts_rt.rollout.rows import RolloutRow, Score, rows_of
from vtts_rt.rounds.ask import ASK_RULES, Ask, Perception
from vtts_rt.rounds.rollouts import RolloutGroup, check_sampling
from vtts_rt.rounds.streams import in_thread
from vtts_rt.types import SamplingParams, require

logger = logging.getLogger(__name__)

_END = object()  # of a feed, where None would be a wrong entry
# (group id, Ask) each; or a feed, whose items become Asks.
Feed: TypeAlias = "Iterable[tuple[str, Ask]] | AsyncIterable[tuple[str, Ask]] | RolloutDataFeed"
# What a worker says: a group, the error that ends the run, or that the feed is at its end.
_Output: TypeAlias = "tuple[_Place, FinishedGroup] | Exception | None"
# What a group's members are worth; the item is that of a RolloutDataFeed.
Scorer: TypeAlias = Callable[[RolloutGroup, "RolloutItem | None"], Sequence["Score | None"]]


class _Left(NamedTuple):
    """Where a run left a feed that it did not end. given: out, of what stands behind."""

    position: Mapping[str, Any] | None
    given: frozenset[str]


_NOWHERE = _Left(None, frozenset())


class Sampler(Protocol):
    """What samples groups: a Runtime, or a `cluster.RolloutCluster`."""

    async def rollouts_async(
        self, ask: Ask, num_answers: int, *, group_id: str = ""
    ) -> RolloutGroup: ...
    def update_weights(self, tensors: Mapping[str, Tensor], *, finish: bool = True) -> None: ...
    def sleep(self) -> None: ...
    def wake(self) -> None: ...


@dataclass(frozen=True, slots=True, eq=False)
class FinishedGroup:
    """A group that has ended. rows: of the members that have an answer, scored if the engine
    scores. item: of the feed, if that is a RolloutDataFeed. Where the group as a whole failed (its
    video cannot be opened, say) all members are that error and there are no rows."""

    group: RolloutGroup
    rows: list[RolloutRow]
    item: RolloutItem | None = None

    @property
    def is_complete(self) -> bool:
        """Whether it is what the group will always be: there are rows, and no member was ended from
        outside (Aborted). Members that failed by themselves would fail again."""
        return bool(self.rows) and not any(isinstance(e, Aborted) for e in self.group.errors)

    @property
    def failure(self) -> str:
        """Why it is not complete: the sentence of a member."""
        errors = self.group.errors
        error = next((e for e in errors if isinstance(e, Aborted)), errors[0] if errors else None)
        return "no member finished a round in time" if error is None else str(error)


_RULES: dict[str, Rule] = {
    "num_answers": (lambda v: is_whole(v) and v >= 2, "a whole number >= 2"),
    "max_groups": (lambda v: is_whole(v) and v >= 1, "a whole number >= 1"),
    "journal": (lambda v: v is None or isinstance(v, RolloutJournal), "a RolloutJournal or None"),
    "score": (lambda v: v is None or callable(v), "a function or None"),
    **{name: ASK_RULES[name] for name in ("perception", "sampling", "timeout_seconds")},
}


class RolloutEngine:
    """Samples the groups of a feed on a Runtime or cluster, in one event loop.

    num_answers: members of a group. max_groups: in flight at a time; as many more may wait,
    finished, for the consumer. perception, sampling: of the Asks made of a RolloutDataFeed's items;
    the seed is the item's. timeout_seconds: of each member of these. score: what the members are
    worth; an error of it ends the run. journal: complete groups (`FinishedGroup.is_complete`), also
    those of which some members failed, are written to it before they are given out, and those in it
    are passed over, of a RolloutDataFeed without reading them. Whatever is not in it is sampled by
    a run that comes to it: so a resumed run, with a feed at its start, tries again what failed or
    was aborted, in whichever epoch.
    What a group gives depends on its Ask and the weights alone, not on the order of the groups.
    BadRequest for an argument.
    """

    def __init__(
        self,
        sampler: Sampler,
        num_answers: int,
        *,
        max_groups: int = 4,
        perception: Perception | None = None,
        sampling: SamplingParams | None = None,
        timeout_seconds: float | None = None,
        score: Scorer | None = None,
        journal: RolloutJournal | None = None,
    ) -> None:
        given = locals()
        check("RolloutEngine", _RULES, {name: given[name] for name in _RULES})
        check_sampling("RolloutEngine", sampling)
        self.sampler, self.num_answers, self.max_groups = sampler, num_answers, max_groups
        self._perception, self._sampling = perception, sampling or SamplingParams()
        self._timeout_seconds = timeout_seconds
        self._score, self._journal = score, journal
        self._left = _NOWHERE
        self._awake, self._idle = asyncio.Event(), asyncio.Event()
        self._awake.set()
        self._idle.set()
        self._in_flight = 0

    async def run(self, feed: Feed) -> AsyncGenerator[FinishedGroup, None]:
        """Every group of the feed as it ends; closing the generator aborts those in flight.

        A feed that is no asynchronous iterable is iterated on a thread. Errors of the feed and of
        `score` are raised here; what fails in a group is in its members. A run of a RolloutDataFeed
        that ends early leaves it at its first group that was not given out, and the engine's next
        run goes on there with those that were neither given out nor are in the journal.
        """
        source = _Source(feed, self._ask_of, self._journal, self._left)
        out: asyncio.Queue[_Output] = asyncio.Queue(self.max_groups)
        workers = [asyncio.create_task(self._work(source, out)) for _ in range(self.max_groups)]
        left = len(workers)
        try:
            while left:
                output = await out.get()
                if isinstance(output, Exception):
                    raise output
                if output is None:
                    left -= 1
                else:
                    place, finished = output
                    source.give(place)
                    yield finished
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
            await source.close()
            self._left = source.leave() if left else _NOWHERE

    async def _work(self, source: _Source, out: asyncio.Queue[_Output]) -> None:
        """One group after another."""
        try:
            while (pulled := await source.pull()) is not None:
                group = await self._sample(pulled)
                finished = await in_thread(partial(self._scored, group, pulled.item))
                place = pulled.place
                if not finished.is_complete:
                    logger.warning("group %s failed: %s", place.group_id, finished.failure)
                elif self._journal is not None:
                    rows, errors = tuple(finished.rows), errors_of(group.members)
                    record = GroupRecord(place.group_id, rows, errors, place.position)
                    # Not on a thread: once begun, a record and what knows of it are written whole.
                    self._journal.append(record)
                await out.put((place, finished))
            await out.put(None)
        except Exception as error:
            await out.put(error)

    async def _sample(self, pulled: _Pulled) -> RolloutGroup:
        await self._awake.wait()
        self._in_flight += 1
        self._idle.clear()
        try:
            return await self.sampler.rollouts_async(
                pulled.ask, self.num_answers, group_id=pulled.place.group_id
            )
        except Exception as error:
            members = (error.with_traceback(None),) * self.num_answers
            return RolloutGroup(pulled.place.group_id, pulled.ask, members)
        finally:
            self._in_flight -= 1
            if not self._in_flight:
                self._idle.set()

    def _scored(self, group: RolloutGroup, item: RolloutItem | None) -> FinishedGroup:
        some = self._score is not None and group.answers
        scores = self._score(group, item) if some and self._score is not None else None
        return FinishedGroup(group, rows_of(group, scores), item)

    def _ask_of(self, item: RolloutItem) -> Ask:
        return Ask(
            **item.request,
            perception=self._perception,
            sampling=dataclasses.replace(self._sampling, seed=item.seed),
            timeout_seconds=self._timeout_seconds,
            what="RolloutEngine",
        )

    # -- between phases ---------------------------------------------------------------------

    async def update_weights(self, tensors: Mapping[str, Tensor], *, finish: bool = True) -> None:
        """As `Runtime.update_weights`: groups in flight end by the old weights, those that begin
        later see the new ones."""
        await in_thread(lambda: self.sampler.update_weights(tensors, finish=finish))

    async def sleep(self) -> None:
        """Begin no group until `wake`, let those in flight end, then free the sampler's memory."""
        self._awake.clear()
        await self._idle.wait()
        await in_thread(self.sampler.sleep)

    async def wake(self) -> None:
        """Undo `sleep`."""
        await in_thread(self.sampler.wake)
        self._awake.set()

    @asynccontextmanager
    async def asleep(self) -> AsyncIterator[None]:
        """`sleep`, and `wake` at the end: for a training step on the same device."""
        try:
            await self.sleep()
            yield
        finally:
            await self.wake()


@dataclass(slots=True, eq=False)
class _Place:
    """Of a group in a feed. position: the feed's state behind it, if it has one. given: out."""

    group_id: str
    position: Mapping[str, Any] | None
    given: bool = False


class _Pulled(NamedTuple):
    """What is to be sampled."""

    place: _Place
    ask: Ask
    item: RolloutItem | None


class _Source:
    """Takes from a feed, one at a time, what is not done yet. left: where the run before left."""

    def __init__(
        self,
        feed: Feed,
        ask_of: Callable[[RolloutItem], Ask],
        journal: RolloutJournal | None,
        left: _Left,
    ) -> None:
        self._feed, self._ask_of = feed, ask_of
        self._done: Container[object] = () if journal is None else journal
        self._seen: set[str] = set()
        self._taken: deque[_Place] = deque()  # from the first on that was not given out
        self._position: Mapping[str, Any] | None = None  # before that
        self._turn = asyncio.Lock()
        self._pull: asyncio.Task[Any] | None = None
        if isinstance(feed, RolloutDataFeed):
            size = feed.batch_size
            require("RolloutEngine", "batch_size of the feed", size, size is None, "None")
            if journal is not None and journal.position is not None:
                feed.check_state(journal.position)
            self._position = feed.state_dict()
        self._given = left.given if left.position == self._position else frozenset()
        self._iterator: Any = None

    async def pull(self) -> _Pulled | None:
        """The next that is not done, or None at the end."""
        async with self._turn:
            while True:
                found = await self._next()
                if found is None:
                    return None
                entry, position = found
                item = entry if isinstance(entry, RolloutItem) else None
                group_id, ask = _entry(entry) if item is None else (item.group_id, None)
                is_new = group_id not in self._seen
                require("RolloutEngine", "group_id", group_id, is_new, "another for every group")
                self._seen.add(group_id)
                if self._is_done(group_id):
                    continue
                if ask is None:
                    assert item is not None
                    ask = self._ask_of(item)
                place = _Place(group_id, position)
                self._taken.append(place)
                return _Pulled(place, ask, item)

    def _is_done(self, group_id: str) -> bool:
        return group_id in self._given or group_id in self._done

    def give(self, place: _Place) -> None:
        """Note that a group is given out."""
        place.given = True
        while self._taken and self._taken[0].given:
            self._position = self._taken.popleft().position

    def leave(self) -> _Left:
        """Set the feed, which is closed, to the first group that was not given out."""
        if not isinstance(self._feed, RolloutDataFeed):
            return _NOWHERE
        assert self._position is not None
        self._feed.load_state_dict(self._position)
        given = {place.group_id for place in self._taken if place.given}
        return _Left(self._position, self._given | given)

    async def _next(self) -> tuple[Any, Mapping[str, Any] | None] | None:
        """Survives the cancellation of the worker that asks: the feed is not left half asked."""
        feed = self._feed
        if isinstance(feed, AsyncIterable):
            self._iterator = self._iterator or aiter(feed)
            step = anext(self._iterator, _END)
            self._pull = asyncio.ensure_future(step)
            item = await self._pull
            return None if item is _END else (item, None)
        self._pull = asyncio.create_task(in_thread(self._advance))
        return await asyncio.shield(self._pull)

    def _advance(self) -> tuple[Any, Mapping[str, Any] | None] | None:
        if self._iterator is None:
            feed: Any = self._feed
            is_data = isinstance(feed, RolloutDataFeed)
            self._iterator = feed.without(self._is_done) if is_data else iter(feed)
        item = next(self._iterator, _END)
        if item is _END:
            return None
        feed = self._feed
        return item, feed.state_dict() if isinstance(feed, RolloutDataFeed) else None

    async def close(self) -> None:
        """Wait for what is being taken from an iterable on a thread, and close what is a
        generator."""
        if self._pull is not None:
            await asyncio.wait([self._pull])
            if not self._pull.cancelled():
                self._pull.exception()  # it was raised to a worker, or nobody asks any more
        iterator = self._iterator
        if hasattr(iterator, "aclose"):
            await iterator.aclose()
        elif isinstance(iterator, Iterator) and hasattr(iterator, "close"):
            await in_thread(iterator.close)


def _entry(entry: Any) -> tuple[str, Ask]:
    ok = isinstance(entry, tuple) and len(entry) == 2
    ok = ok and isinstance(entry[0], str) and isinstance(entry[1], Ask)
    require("RolloutEngine", "an entry of the feed", entry, ok, "(group id, Ask)")
    return entry  # type: ignore[no-any-return]
