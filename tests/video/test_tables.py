"""Indices from the sample tables of MP4 and QuickTime: those of the pass over all packets."""

from __future__ import annotations

import functools
import io
import random
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
from index_cache_tools import fields
from video.zoo import box, boxes, clip, encoded, remux, with_edits
from video.zoo_broken import BROKEN
from video.zoo_damaged import CODECS as DAMAGED
from video.zoo_damaged import KINDS, damaged
from video.zoo_sound import H264, HEVC, SOUND

from vtts_rt.errors import BadMedia
from vtts_rt.video import container, facts, index, tables
from vtts_rt.video.bounds import check_header
from vtts_rt.video.container import Media
from vtts_rt.video.limits import Opening

X264: dict[str, dict[str, Any]] = {
    "b-frames": {},
    "open groups": {"x264-params": "open-gop=1:scenecut=0"},
    "messages in every packet": {
        "x264-params": "aud=1:nal-hrd=vbr:vbv-maxrate=100:vbv-bufsize=100"
    },
    "intra refresh": {"x264-params": "intra-refresh=1:bframes=0"},
    # I slices in the middle of a group: key frames to FFmpeg where one reference is kept.
    "one reference": {"x264-params": "ref=1:keyint=100:scenecut=40:bframes=0"},
    "some I slices": {"x264-params": "ref=3:keyint=100:scenecut=40"},
    "slices": {"x264-params": "slices=4:cabac=0"},
}


@functools.cache
def sound(name: str) -> bytes:
    options = HEVC if name == "hevc" else {**H264, "encoder_options": X264[name]}
    return encoded("mp4", 30, gop=10, **options)


def in_front(content: bytes, folder: Path) -> bytes:
    """With the header before the packets."""
    path = folder / "front.mp4"  # FFmpeg reads again what it wrote
    remux(content, path, options={"movflags": "faststart"})
    whole = path.read_bytes()
    assert whole.index(b"moov") < whole.index(b"mdat")
    return whole


class Tables:
    """Opens with the tables, however few packets there are, comparing as few as possible; tables:
    whether the last one was used, None where there was none; demuxed: packets since `learned`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._patch = monkeypatch
        self.used: bool | None = None
        self.demuxed = 0
        monkeypatch.setattr(facts, "PIECE_BYTES", 0)
        monkeypatch.setattr(tables, "SAMPLES", 2)
        of_table, of_container = tables.SampleTable.packets, container.demuxed

        def packets(table: tables.SampleTable, *args: Any) -> Any:
            found = of_table(table, *args)
            self.used = found is not None
            return found

        def demuxed(*args: Any) -> Iterator[Any]:
            for packet in of_container(*args):
                self.demuxed += 1
                yield packet

        monkeypatch.setattr(tables.SampleTable, "packets", packets)
        for module in (index, tables):
            monkeypatch.setattr(module, "demuxed", demuxed)

    def learned(self, content: Path | bytes, min_packets: int = 1) -> dict[str, Any] | str:
        """The facts of a content by their names, or the error."""
        self._patch.setattr(tables, "MIN_PACKETS", min_packets)
        container._hashes.clear()
        self.used, self.demuxed = None, 0
        try:
            media = Media(content, Opening())
            tracks = check_header(media, media.opening)
            with media.open() as opened:
                return fields(facts.learn_facts(media, opened, None, tracks))
        except BadMedia as error:
            return str(error)

    def agree(self, content: Path | bytes) -> bool | None:
        """`used`, where a pass over the packets gives the same."""
        with_tables, used = self.learned(content), self.used
        assert with_tables == self.learned(content, 1 << 60)
        assert self.used is None
        return used


@pytest.fixture
def opening(monkeypatch: pytest.MonkeyPatch) -> Tables:
    if not hasattr(av.stream.Stream, "index_entries"):
        pytest.skip("PyAV 17 does not give the entries of tables")
    return Tables(monkeypatch)


@pytest.mark.parametrize("name", [*X264, "hevc"])
def test_tables_give_what_a_pass_gives(name: str, opening: Tables, tmp_path: Path) -> None:
    content = sound(name)
    assert opening.agree(content)
    assert opening.agree(in_front(content, tmp_path))
    # Without a table of key frames every packet counts as one, but for what H.264 says itself.
    assert opening.agree(content.replace(b"stss", b"free"))


def test_long_files_are_not_passed_over(opening: Tables, tmp_path: Path) -> None:
    path = tmp_path / "long.mp4"
    clip(path, 600, hw=(16, 16), **H264)
    assert isinstance(opening.learned(path), dict) and opening.used
    # The first frame, and the samples with those that the demuxer gives before them.
    assert 0 < opening.demuxed < 60
    opening.learned(path, 601)
    assert opening.used is None and opening.demuxed == 600


def zoo(sound: Callable[[str], bool]) -> list[str]:
    cases = {**SOUND, **BROKEN}
    return [name for name in cases if cases[name].suffix in ("mp4", "mov") and sound(name)]


@pytest.mark.parametrize("name", zoo(lambda name: name in SOUND and "av1" not in name))
def test_unusual_files(name: str, opening: Tables, tmp_path: Path) -> None:
    path = tmp_path / f"clip.{SOUND[name].suffix}"
    SOUND[name].write(path)
    used = opening.agree(path)
    if "fragmented" in name or "vp9" in name or "two pieces" in name:
        assert used is None


@pytest.mark.slow
@pytest.mark.parametrize("name", zoo(lambda name: name in BROKEN or "av1" in name))
def test_broken_files(name: str, opening: Tables, tmp_path: Path) -> None:
    case = {**SOUND, **BROKEN}[name]
    path = tmp_path / f"clip.{case.suffix}"
    case.write(path)
    opening.agree(path)


@pytest.mark.slow
@pytest.mark.parametrize("codec", [c for c in DAMAGED if {"mp4", "mov"} & set(DAMAGED[c][0])])
def test_damaged_files(codec: str, opening: Tables) -> None:
    for name in {"mp4", "mov"} & set(DAMAGED[codec][0]):
        for kind in KINDS:
            for seed in range(10):
                opening.agree(damaged(codec, name, kind, seed))


def with_track(mp4: bytes, kind: bytes, change: Callable[[bytes], bytes]) -> bytes:
    """Another body for a box of the sample table."""
    path = (b"moov", b"trak", b"mdia", b"minf", b"stbl", kind)

    def changed(data: bytes, depth: int) -> bytes:
        if depth == len(path):
            return change(data)
        parts = boxes(data)
        return b"".join(box(k, changed(b, depth + 1) if k == path[depth] else b) for k, b in parts)

    return changed(mp4, 0)


def test_what_tables_do_not_tell_is_passed_over(opening: Tables, tmp_path: Path) -> None:
    content = sound("b-frames")
    # Samples that edits leave out, a file that ends early, one sample without bytes.
    assert opening.agree(with_edits(content, [(1.9, 0.5)])) is None
    assert opening.agree(with_edits(content, [(1.0, 0.0), (1.0, 1.0)])) is None
    assert opening.agree(in_front(content, tmp_path)[:-300]) is None
    sizes = with_track(content, b"stsz", lambda b: b[:16] + bytes(4) + b[20:])
    assert opening.agree(sizes) is None
    # A table of offsets that is shorter than the others, or holds what FFmpeg does not believe.
    short = with_track(content, b"ctts", lambda b: b[:4] + struct.pack(">I", 5) + b[8:48])
    assert opening.agree(short) is None
    huge = with_track(content, b"ctts", lambda b: b[:12] + struct.pack(">i", 1 << 29) + b[16:])
    assert opening.agree(huge) is None
    # Decode times that jump: mended by a look at all of them.
    jump = with_track(content, b"stts", lambda b: struct.pack(">6I", 0, 2, 9, 1 << 30, 21, 1024))
    assert not opening.agree(jump)


def test_wrong_tables_are_found_by_samples(
    opening: Tables, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if FFmpeg read a table in another way than it is read here."""
    content, made = sound("b-frames"), tables.SampleTable
    want = opening.learned(content, 1 << 60)
    monkeypatch.setattr(tables, "SAMPLES", 64)
    for column, by in ((0, 1024), (1, 1), (2, 4), (3, 1)):

        def wrong(columns: np.ndarray, *args: Any, c: int = column, b: int = by) -> Any:
            columns[20, c] += b
            return made(columns, *args)

        monkeypatch.setattr(tables, "SampleTable", wrong)
        assert opening.learned(content) == want and opening.used is False

    def keys(*args: Any) -> Any:
        table = made(*args)
        monkeypatch.setattr(table, "look", lambda start, data: table._keys.fill(0))
        return table

    monkeypatch.setattr(tables, "SampleTable", keys)
    assert opening.learned(content) == want and opening.used is False


def test_many_unclear_key_frames_are_passed_over(
    opening: Tables, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = sound("some I slices")
    assert opening.agree(content)
    monkeypatch.setattr(tables, "MAX_ASKED", 0)
    monkeypatch.setattr(tables, "IS_INTER", np.zeros(256, bool))
    assert opening.agree(content) is False


def test_parts_of_the_content_may_come_in_any_order() -> None:
    content = sound("messages in every packet")
    with av.open(io.BytesIO(content)) as opened:
        stream = opened.streams.video[0]
        packets = [p for p in opened.demux(stream) if p.size]
        assert stream.codec_context.extradata
        columns = np.array([(p.pts, p.dts, p.pos, p.size, 0) for p in packets], np.int64)
    want = [p.is_keyframe for p in packets]
    for part in (len(content), 1000, 100):
        table = tables.SampleTable(columns, np.zeros(len(want), np.int64), 4)
        starts = list(range(0, len(content), part))
        random.Random(part).shuffle(starts)
        for start in starts:
            table.look(start, memoryview(content)[start : start + part])
        told = table._keys >= 0
        assert told.all() == (part == len(content))
        assert (table._keys[told] == np.array(want)[told]).all()


TABLE_BOXES = b"stts ctts stss stsc stsz stco elst tkhd mdhd mvhd stsd avcC hvcC".split()


def mutant(content: bytes, rng: random.Random) -> bytes:
    """1 to 4 bytes of it changed, most of them in the tables; now and then cut off."""
    data, kinds = bytearray(content), [kind for kind in TABLE_BOXES if kind in content]
    place = rng.random()
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at = rng.randrange(content.index(b"moov") if place < 0.85 else 0, len(data))
        if place < 0.7:
            head = content.index(rng.choice(kinds))
            at = head + rng.randrange(-4, int.from_bytes(content[head - 4 : head], "big") - 4)
        change = rng.choice((data[at] ^ 1 << rng.randrange(8), data[at] + 1, data[at] - 1, 0, 255))
        data[at] = change % 256
    return bytes(data[: rng.randrange(len(data))] if rng.random() < 0.03 else data)


def fuzz(opening: Tables, seeds: range) -> Counter[bool | None]:
    contents = [sound(name) for name in (*X264, "hevc")]
    contents += [with_edits(contents[0], e) for e in ([(0.5, None), (3.0, 0.2)], [(3.0, 0.0)])]
    used: Counter[bool | None] = Counter()
    for seed in seeds:
        rng = random.Random(seed)
        used[opening.agree(mutant(rng.choice(contents), rng))] += 1
    return used


def test_changed_bytes_give_what_a_pass_gives(opening: Tables) -> None:
    used = fuzz(opening, range(40))
    assert used[True] > 5 and used[None] > 5


@pytest.mark.slow
def test_many_changed_bytes_give_what_a_pass_gives(opening: Tables) -> None:
    used = fuzz(opening, range(100, 6100))
    assert min(used[True], used[False], used[None]) > 10


@pytest.mark.parametrize(("place", "taken"), [(4, True), (3, False), (0, False)])
def test_packets_over_each_other_are_left_to_a_pass(place: int, taken: bool) -> None:
    """Their bytes would be looked at as often as tables name them."""
    num = tables.MIN_PACKETS
    entries = [SimpleNamespace(timestamp=n, pos=4 * n, size=4, flags=1) for n in range(num)]
    entries[1].pos = place
    codec = SimpleNamespace(canonical_name="mjpeg")
    stream: Any = SimpleNamespace(
        id=1, index_entries=entries, codec_context=SimpleNamespace(codec=codec)
    )
    track: Any = SimpleNamespace(
        number=1, num_samples=num, stts=np.array([[num, 1]]), ctts=[], num_edits=0
    )
    assert (tables.sample_table(None, stream, [track], 4 * num) is not None) is taken
