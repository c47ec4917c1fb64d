"""Order, shards, batches and resumption, for any number of rows: properties, without files."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from feed_tools import FakeVideos, data_sets, use
from hypothesis import given, settings
from hypothesis import strategies as st

from vtts_rt.data.feed import RolloutDataFeed, RolloutItem
from vtts_rt.data.order import deal, shuffled

COUNTS = st.lists(st.integers(1, 5), min_size=1, max_size=12)
SEEDS = st.one_of(st.none(), st.integers(-(2**70), 2**70))


@pytest.fixture(scope="module", autouse=True)
def _no_files() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        use(patch, FakeVideos())
        yield


def numbers(items: list[Any]) -> list[int]:
    flat = [i for entry in items for i in (entry if isinstance(entry, list) else [entry])]
    for item in flat:
        assert isinstance(item, RolloutItem)
        video = int(item.media.stem)
        assert all((frame == video).all() for frame in item.frames), "another file's frames"
        assert f"of {video}?" in item.row.question
    return [item.row_number for item in flat]


@given(weights=st.lists(st.integers(1, 50), max_size=40), num_parts=st.integers(1, 9))
def test_parts_are_disjoint_complete_and_even(weights: list[int], num_parts: int) -> None:
    parts = deal(weights, num_parts)
    assert sorted(n for part in parts for n in part) == list(range(len(weights)))
    loads = [sum(weights[n] for n in part) for part in parts]
    assert max(loads) - min(loads) <= max(weights, default=0)


@given(st.sets(st.integers(0, 1000)), st.integers())
def test_a_shuffle_depends_on_the_set_and_the_key(numbers: set[int], key: int) -> None:
    once = shuffled(numbers, key)
    assert set(once) == numbers and len(once) == len(numbers)
    assert shuffled(reversed(once), key) == once


def test_the_order_of_a_seed_is_pinned() -> None:
    """Checkpoints of one version go on under the next."""
    assert shuffled(range(8), 0, 0, "video") == PINNED


PINNED = [6, 4, 1, 5, 7, 2, 0, 3]


@settings(deadline=None, max_examples=40)
@given(
    counts=COUNTS,
    world_size=st.integers(1, 4),
    seed=SEEDS,
    num_workers=st.integers(1, 3),
    batch_size=st.one_of(st.none(), st.integers(1, 4)),
)
def test_shards_together_are_all_rows_once(
    counts: list[int], world_size: int, seed: int | None, num_workers: int, batch_size: int | None
) -> None:
    sets = data_sets(counts)
    epochs: list[list[list[int]]] = [[], []]
    for rank in range(world_size):
        feed = RolloutDataFeed(
            sets,
            shard=(rank, world_size),
            shuffle_seed=seed,
            num_workers=num_workers,
            batch_size=batch_size,
        )
        for epoch in (0, 1):
            assert feed.epoch == epoch
            batches = list(feed)
            assert len(batches) == len(feed)
            if batch_size:
                assert all(len(batch) == batch_size for batch in batches[:-1])
            epochs[epoch].append(numbers(batches))
        # A video is read once an epoch, for all its rows.
        videos = {feed._rows[number].media for number in epochs[0][rank]}
        assert feed.stats()["videos_opened"] == 2 * len(videos)
    for shards in epochs:
        assert sorted(n for shard in shards for n in shard) == list(range(sum(counts)))
    assert [sorted(shard) for shard in epochs[0]] == [sorted(shard) for shard in epochs[1]]
    if seed is None:
        assert all(shard == sorted(shard) for shard in epochs[0])


@settings(deadline=None, max_examples=60)
@given(data=st.data(), counts=COUNTS, seed=SEEDS, remainder=st.sampled_from(["keep", "pad"]))
def test_a_resumed_feed_goes_on_exactly(
    data: st.DataObject, counts: list[int], seed: int | None, remainder: Any
) -> None:
    world_size = data.draw(st.integers(1, 3 if remainder == "keep" else min(3, len(counts))))
    batch_size = data.draw(st.one_of(st.none(), st.integers(1, 4)))
    broken = data.draw(st.sets(st.integers(0, len(counts) - 1), max_size=len(counts) // 3))
    sets = data_sets(counts)

    def make(num_workers: int) -> RolloutDataFeed:
        shard = (world_size - 1, world_size)
        return RolloutDataFeed(
            sets,
            shard=shard,
            shuffle_seed=seed,
            batch_size=batch_size,
            remainder=remainder,
            num_workers=num_workers,
            prefetch=data.draw(st.integers(1, 4)),
            on_bad="skip",
        )

    with pytest.MonkeyPatch.context() as patch:
        use(patch, FakeVideos(broken))
        feed = make(1)
        readable = [n for n in feed._order.epoch((world_size - 1, world_size), 0)]
        readable = [n for n in readable if int(feed._rows[n].media.stem) not in broken]
        if not readable:
            return
        whole = [numbers([batch]) for _ in range(3) for batch in feed]
        stop = data.draw(st.integers(0, len(whole)))
        first, given = make(2), []
        while len(given) < stop:
            for batch in first:
                given.append(numbers([batch]))
                if len(given) == stop:
                    break
        state = json.loads(json.dumps(first.state_dict()))
        second = make(3)
        second.load_state_dict(state)
        assert second.state_dict() == state
        while second.epoch < 3:
            given += [numbers([batch]) for batch in second]
        assert given == whole


@settings(deadline=None, max_examples=40)
@given(
    data=st.data(),
    counts=COUNTS,
    seed=SEEDS,
    remainder=st.sampled_from(["keep", "drop", "pad"]),
    batch_size=st.one_of(st.none(), st.integers(1, 3)),
)
def test_what_is_done_is_passed_over_unread(
    data: st.DataObject, counts: list[int], seed: int | None, remainder: Any, batch_size: int | None
) -> None:
    broken = data.draw(st.sets(st.integers(0, len(counts) - 1), max_size=len(counts) // 3))
    sets = data_sets(counts)
    if remainder == "drop":
        batch_size = 1 if sum(counts) < (batch_size or 1) else batch_size

    def given(is_done: Any) -> tuple[list[RolloutItem], FakeVideos]:
        with pytest.MonkeyPatch.context() as patch:
            videos = use(patch, FakeVideos(broken))
            more: dict[str, Any] = {"remainder": remainder, "batch_size": batch_size}
            feed = RolloutDataFeed(sets, shuffle_seed=seed, on_bad="skip", **more)
            found: list[Any] = []
            while feed.epoch < 2:
                assert feed.epoch == len(found)
                found.append(list(feed.without(is_done)))
            items = [i for epoch in found for entry in epoch for i in (entry if batch_size else [entry])]  # fmt: skip  # noqa: E501
            return items, videos

    whole, _ = given(lambda group_id: False)
    ids = [item.group_id for item in whole]
    assert len(set(ids)) == len(ids)
    done = data.draw(st.sets(st.sampled_from(ids)))
    rest, videos = given(done.__contains__)
    assert [item.group_id for item in rest] == [name for name in ids if name not in done]
    assert set(videos.opened) - broken == {int(item.media.stem) for item in rest}


@settings(deadline=None, max_examples=40)
@given(
    counts=st.lists(st.integers(1, 5), min_size=4, max_size=12),
    world_size=st.integers(1, 4),
    batch_size=st.integers(1, 3),
    remainder=st.sampled_from(["drop", "pad"]),
    broken=st.sets(st.integers(0, 11), max_size=2),
)
def test_ranks_give_the_same_number_of_whole_batches(
    counts: list[int], world_size: int, batch_size: int, remainder: Any, broken: set[int]
) -> None:
    sets = data_sets(counts)
    lengths = []
    with pytest.MonkeyPatch.context() as patch:
        use(patch, FakeVideos(broken))
        for rank in range(world_size):
            try:
                feed = RolloutDataFeed(
                    sets,
                    shard=(rank, world_size),
                    batch_size=batch_size,
                    remainder=remainder,
                    on_bad="skip",
                )
            except ValueError as error:
                assert remainder == "drop" and "enough for a batch" in str(error)
                return
            try:
                batches = list(feed)
            except RuntimeError as error:
                assert "none of" in str(error)
                return
            assert all(len(batch) == batch_size for batch in batches)
            assert len(batches) == len(feed) > 0
            lengths.append(len(batches))
            times = Counter(numbers(batches))
            if not broken and remainder == "drop":
                assert max(times.values()) == 1
            if not broken and remainder == "pad":
                # Every row of the shard, none much more often than another.
                assert set(times) == set(feed._order.epoch((rank, world_size), 0))
                assert max(times.values()) - min(times.values()) <= 1
    assert len(set(lengths)) == 1


def test_another_epoch_is_another_order_of_the_same_rows() -> None:
    feed = RolloutDataFeed(data_sets([2] * 20), shuffle_seed=7)
    orders = [numbers(list(feed)) for _ in range(3)]
    assert len({tuple(order) for order in orders}) == 3
    assert len({tuple(sorted(order)) for order in orders}) == 1
    again = RolloutDataFeed(data_sets([2] * 20), shuffle_seed=7)
    again.set_epoch(2)
    assert numbers(list(again)) == orders[2]
    of_one_video = RolloutDataFeed(data_sets([20]), shuffle_seed=7)
    assert len({tuple(numbers(list(of_one_video))) for _ in range(3)}) == 3
    other = RolloutDataFeed(data_sets([2] * 20), shuffle_seed=8)
    assert numbers(list(other)) != orders[0]


def test_what_is_prefetched_is_not_what_was_delivered(monkeypatch: pytest.MonkeyPatch) -> None:
    videos, far = use(monkeypatch, FakeVideos()), threading.Event()
    videos.before_open = lambda number: far.set() if number == 10 else None
    feed = RolloutDataFeed(data_sets([1] * 30), prefetch=8)
    items = iter(feed)
    given = [next(items).row_number for _ in range(3)]
    assert far.wait(timeout=30)
    assert feed.state_dict()["rows_passed"] == 3
    items.close()
    assert sum(videos.opened.values()) == 11  # three, and eight ahead
    assert given + numbers(list(feed)) == list(range(30))


def test_leaving_at_the_last_item_ends_the_epoch() -> None:
    feed = RolloutDataFeed(data_sets([1] * 3))
    for item in feed:
        if item.index == 2:
            state = feed.state_dict()
            break
    del item
    assert feed.epoch == 1
    assert numbers(list(feed)) == [0, 1, 2]
    # A checkpoint that was taken inside the loop is of the epoch that it was taken in.
    again = RolloutDataFeed(data_sets([1] * 3))
    again.load_state_dict(state)
    again.set_epoch(0)
    assert list(again) == [] and again.epoch == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"counts": [1, 2, 1]}, "manifest of the state must be"),
        ({"shuffle_seed": 2}, "shuffle_seed of the state must be 2, got 1"),
        ({"shard": (1, 2)}, r"shard of the state must be \[1, 2\], got \[0, 2\]"),
        ({"batch_size": 3}, "batch_size of the state must be 3, got None"),
        ({"remainder": "pad"}, "remainder of the state must be 'pad', got 'keep'"),
    ],
)
def test_a_state_of_another_feed_is_refused(change: dict[str, Any], message: str) -> None:
    def make(counts: list[int], **options: Any) -> RolloutDataFeed:
        return RolloutDataFeed(data_sets(counts), **{"shuffle_seed": 1, "shard": (0, 2), **options})

    state = make([1, 1, 1]).state_dict()
    with pytest.raises(ValueError, match=f"^RolloutDataFeed: {message}") as caught:
        make(**{"counts": [1, 1, 1], **change}).load_state_dict(state)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("state", [{}, None, {"epoch": 1}])
def test_a_state_that_is_none_is_refused(state: Any) -> None:
    with pytest.raises(ValueError, match="RolloutDataFeed: state must be what `state_dict` gave"):
        RolloutDataFeed(data_sets([1])).load_state_dict(state)
    bad = {**RolloutDataFeed(data_sets([1])).state_dict(), "rows_passed": -1}
    with pytest.raises(ValueError, match="rows_passed, delivered of the state must be integers"):
        RolloutDataFeed(data_sets([1])).load_state_dict(bad)
