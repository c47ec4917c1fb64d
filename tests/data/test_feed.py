"""The rollout feed over real files: frames, groups, broken files, DataLoader, a shared store."""

from __future__ import annotations

import json
import pickle
import shutil
import threading
from concurrent.futures import wait
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from feed_tools import NUM_CLIPS, SIDE, FakeVideos, check_frames, make_manifest, rows_of
from torch.utils.data import DataLoader
from utils import resolved

from vtts_rt import FrameStore, PerceptionConfig, RolloutDataFeed
from vtts_rt.data import feed as feed_module
from vtts_rt.data import frames as frames_module
from vtts_rt.data.rows import Row, read_manifest
from vtts_rt.perception.strategy import plan_round
from vtts_rt.types import TimeSpan
from vtts_rt.video import open_video

if TYPE_CHECKING:
    from vtts_rt import Runtime


def test_an_item_holds_what_a_rollout_needs(manifest: Path) -> None:
    feed = RolloutDataFeed(manifest, frames=3, group_size=4)
    items = list(feed)
    assert [item.row for item in items] == rows_of([2] * NUM_CLIPS)
    for place, item in enumerate(items):
        check_frames(item)
        assert (item.epoch, item.index, item.row_number) == (0, place, place)
        assert item.group_size == 4 and item.data_set == "set-video"
        with open_video(item.media) as source:
            assert item.metadata == source.metadata
            expected = dict(source.read(item.frame_indices))
        assert item.frame_indices == (0, 2, 5)  # linspace(0, 5, 3), half to even
        assert item.timestamps_seconds == (0.0, 0.5, 1.25)
        for index, frame in zip(item.frame_indices, item.frames, strict=True):
            assert np.array_equal(frame, expected[index])
        assert item.request == {
            "videos": str(item.media),
            "question": item.row.question,
            "options": (),
            "decoder": "auto",
            "device": None,
        }


def test_a_video_is_opened_and_decoded_once_for_all_its_rows_and_answers(manifest: Path) -> None:
    feed = RolloutDataFeed(manifest, frames=3, group_size=8, shuffle_seed=3)
    for epoch in (1, 2):
        items = list(feed)
        stats = feed.stats()
        assert stats["videos_opened"] == NUM_CLIPS * epoch
        assert stats["frames_decoded"] == 3 * NUM_CLIPS * epoch
        assert stats["items_delivered"] == 2 * NUM_CLIPS * epoch
        assert stats["frames_delivered"] == 6 * NUM_CLIPS * epoch
        assert stats["frames_codec_decoded"] >= stats["frames_decoded"]
        assert stats["rows_skipped"] == {} and stats["frames_substituted"] == 0
        for first, second in zip(items[::2], items[1::2], strict=True):
            assert all(a is b for a, b in zip(first.frames, second.frames, strict=True))


def test_all_frames_of_a_short_video(manifest: Path) -> None:
    for item in RolloutDataFeed(manifest, frames=100):
        assert item.frame_indices == tuple(range(6))


@pytest.mark.parametrize("strategy", ["official", "append"])
def test_frames_of_a_first_round(manifest: Path, strategy: Any) -> None:
    config = resolved(strategy=strategy, sample_fps=2.0)
    for item in RolloutDataFeed(manifest, frames=config):
        plan = plan_round(strategy, config, [item.metadata], [], 0)
        assert item.frame_indices == tuple(sorted(set(plan.frame_indices)))
        check_frames(item)


def test_images_spans_and_durations_pass_through(clips_folder: Path, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    (tmp_path / "x.ppm").write_bytes(b"P6\n7 5\n255\n" + pixels.tobytes())
    shutil.copy(clips_folder / "0.mp4", tmp_path)
    video = Row("0.mp4", "When?", spans=(TimeSpan(0.5, 1.0),), duration_seconds=1.5)
    image = Row("x.ppm", "What?", "image", options=("a", "b"), answer="B")
    items = list(RolloutDataFeed(make_manifest(tmp_path, [video, image]), frames=4))
    assert [item.row for item in items] == [video, image]
    assert items[1].metadata.is_image and items[1].frame_indices == (0,)
    assert np.array_equal(items[1].frames[0], pixels)
    assert items[1].request["options"] == ("a", "b")


def test_a_missing_decoder_is_no_fault_of_the_files(
    manifest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "vtts_rt.video.media", None)
    with pytest.raises(RuntimeError, match="pip install av"):
        next(iter(RolloutDataFeed(manifest)))


# -- back-pressure ----------------------------------------------------------------------------


def test_decoding_stops_at_the_bounds(manifest: Path) -> None:
    one_video = 3 * SIDE * SIDE * 3
    feed = RolloutDataFeed(manifest, frames=3, prefetch=5, prefetch_bytes=2 * one_video)
    items = iter(feed)
    next(items)
    ahead = items.gi_frame.f_locals["items"].gi_frame.f_locals["entries"].gi_frame.f_locals["ahead"]
    *held, fourth = [future for *_, future in ahead._queue][:3]
    assert not wait(held, timeout=30).not_done
    assert sum(ahead._held.values()) == 2 * one_video
    assert not wait([fourth], timeout=0.2).done  # opened, and waits for room to decode
    items.close()
    assert feed.stats()["videos_opened"] == 3 and feed.stats()["frames_decoded"] == 9


def test_leaving_early_frees_the_threads(manifest: Path) -> None:
    before = set(threading.enumerate())
    for _ in RolloutDataFeed(manifest, num_workers=3):
        assert set(threading.enumerate()) > before
        break
    assert set(threading.enumerate()) == before
    items = iter(RolloutDataFeed(manifest))
    next(items)
    items.close()
    assert set(threading.enumerate()) == before


def test_one_iteration_at_a_time(manifest: Path) -> None:
    feed = RolloutDataFeed(manifest)
    first = iter(feed)
    next(first)
    second = iter(feed)
    assert next(second).index == 1
    with pytest.raises(RuntimeError, match="^RolloutDataFeed: this iteration is over"):
        next(first)
    assert [item.index for item in second] == list(range(2, 2 * NUM_CLIPS))


def test_two_workers_decode_at_once(manifest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    together = threading.Barrier(2, timeout=30)
    videos = FakeVideos()
    videos.before_open = lambda number: together.wait() if number < 4 else None
    monkeypatch.setattr(frames_module, "open_video", videos)
    assert len(list(RolloutDataFeed(manifest, num_workers=2))) == 2 * NUM_CLIPS


# -- torch and the runtime --------------------------------------------------------------------


def test_as_a_dataset_in_one_process(manifest: Path) -> None:
    feed = RolloutDataFeed(manifest, batch_size=4)
    loader = DataLoader(feed, batch_size=None)
    assert len(loader) == 3
    for _ in range(2):
        assert [[item.row_number for item in batch] for batch in loader] == [
            [0, 1, 2, 3],
            [4, 5, 6, 7],
            [8, 9],
        ]
    assert feed.epoch == 2
    loader = DataLoader(RolloutDataFeed(manifest), batch_size=4, collate_fn=list)
    assert [len(batch) for batch in loader] == [4, 4, 2]


def test_worker_processes_share_the_rows(manifest: Path) -> None:
    numbers = []
    for rank in (0, 1):
        feed = RolloutDataFeed(manifest, frames=2, shuffle_seed=1, shard=(rank, 2))
        loader = DataLoader(feed, batch_size=None, num_workers=2, multiprocessing_context="fork")
        items = list(loader)
        for item in items:
            check_frames_of_a_copy(item)
        assert 0 < len(items) < 2 * NUM_CLIPS
        numbers += [item.row_number for item in items]
    assert sorted(numbers) == list(range(2 * NUM_CLIPS))


def check_frames_of_a_copy(item: Any) -> None:
    for frame in item.frames:
        frame.flags.writeable = False
    check_frames(item)


def test_a_feed_can_be_pickled(manifest: Path) -> None:
    feed = RolloutDataFeed(manifest, shuffle_seed=5)
    items = iter(feed)
    given = [next(items).row_number for _ in range(3)]
    copy = pickle.loads(pickle.dumps(feed))
    items.close()
    assert copy.state_dict() == feed.state_dict()
    rest = [item.row_number for item in copy]
    assert sorted(given + rest) == list(range(2 * NUM_CLIPS))


def test_a_store_stays_in_its_process(manifest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    feed = RolloutDataFeed(manifest, frame_store=FrameStore(1 << 20))
    message = "frame_store must be None where the feed goes to another process"
    with pytest.raises(ValueError, match=message):
        pickle.dumps(feed)
    worker = SimpleNamespace(id=0, num_workers=1)  # a forked one, which pickles nothing
    monkeypatch.setattr(feed_module, "get_worker_info", lambda: worker)
    with pytest.raises(ValueError, match=message):
        list(feed)


def test_frames_in_a_store_are_decoded_once_over_epochs(manifest: Path) -> None:
    store = FrameStore(1 << 20)
    feed = RolloutDataFeed(manifest, frames=3, frame_store=store)
    first, second = list(feed), list(feed)
    stats = feed.stats()
    assert stats["frames_decoded"] == store.frames_decoded == 3 * NUM_CLIPS
    assert stats["frames_reused"] == 3 * NUM_CLIPS
    for a, b in zip(first, second, strict=True):
        check_frames(b)
        assert all(x is y for x, y in zip(a.frames, b.frames, strict=True))
    store.check_integrity()


def test_a_runtime_that_shares_the_store_decodes_nothing_again(
    manifest: Path, exact_runtime: Runtime
) -> None:
    from vtts_rt import Ask, Runtime, SamplingParams

    config = resolved(strategy="append", max_rounds=1, sample_fps=2.0)
    store = FrameStore(1 << 22)
    engine = exact_runtime.engine
    with Runtime(engine.model, engine.tokenizer, frame_store=store) as runtime:
        feed = RolloutDataFeed(manifest, frames=config, group_size=3, frame_store=store)
        sampling = SamplingParams(temperature=1.0, max_tokens=2)
        items = iter(feed)
        item = next(items)
        ask = Ask(**item.request, perception=config, sampling=sampling)
        answers = runtime.rollouts(ask, item.group_size).answers
        assert len(answers) == 3
        for answer in answers:
            assert answer.videos == [item.metadata]
            assert answer.rounds[0].reuse.frames_decoded == 0
        items.close()
    assert store.frames_decoded == feed.stats()["frames_decoded"]
    assert len(store) > 0  # the runtime does not close what is not its own
    store.close()


# -- arguments --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frames": 0}, "frames must be an integer >= 1 or a ResolvedPerception .*, got 0"),
        ({"frames": True}, "frames must be an integer >= 1"),
        ({"frames": PerceptionConfig(strategy="append")}, "frames must be .*Runtime.perception"),
        ({"group_size": 0}, "group_size must be an integer >= 1, got 0"),
        ({"batch_size": 0}, "batch_size must be an integer >= 1, or None, got 0"),
        ({"num_workers": 0}, "num_workers must be an integer >= 1"),
        ({"prefetch": 1.5}, "prefetch must be an integer >= 1, got 1.5"),
        ({"prefetch_bytes": 0}, "prefetch_bytes must be an integer >= 1"),
        ({"shuffle_seed": "a"}, "shuffle_seed must be an integer or None"),
        ({"shard": (2, 2)}, "shard must be .* rank < world size, got"),
        ({"shard": 3}, "shard must be"),
        ({"remainder": "cut"}, "remainder must be one of keep, drop, pad, got 'cut'"),
        ({"decoder": "decord"}, "decoder must be one of auto, pyav, dali, got 'decord'"),
        ({"frame_store": 5}, "frame_store must be a FrameStore or None, got 5"),
        ({"remainder": "pad", "shard": (0, 9)}, "manifest must be whole videos enough for a batch"),
        ({"remainder": "drop", "batch_size": 11}, "manifest must be whole videos enough"),
        ({"manifest": []}, "manifest must be a manifest of at least one row"),
        ({"manifest": 7}, "manifest must be a path or a list of DataSet, got 7"),
        ({"manifest": "nowhere.json"}, "manifest and its rows must be in files .* nowhere.json"),
    ],
)
def test_bad_arguments(manifest: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^RolloutDataFeed: {message}") as caught:
        RolloutDataFeed(**{"manifest": manifest, **change})
    assert "\n" not in str(caught.value)


def test_bad_epoch_and_a_missing_file_of_rows(manifest: Path) -> None:
    feed = RolloutDataFeed(read_manifest(manifest))
    with pytest.raises(ValueError, match="RolloutDataFeed: epoch must be an integer >= 0, got -1"):
        feed.set_epoch(-1)
    data = json.loads(manifest.read_text())
    data["set-video"]["json_path"] = "gone.jsonl"
    manifest.write_text(json.dumps(data))
    with pytest.raises(ValueError, match="files that can be read, got .*gone.jsonl"):
        RolloutDataFeed(manifest)
