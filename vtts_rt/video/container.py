"""Opening media with PyAV: what is refused, what an error says, the identity of a file.

Everything PyAV raises leaves here as a ValueError about the input; nothing reaches the network.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import av

from vtts_rt.errors import BadMedia
from vtts_rt.video.limits import Opening, require_video

# Demuxers that read other files than the one they are given: their content hash would not
# cover the pixels, and they reach where the caller did not point.
NESTED_FORMATS = frozenset({"hls", "concat", "dash", "imf", "sdp", "rtsp", "rtp"})
READ_BYTES = 1 << 18  # every read of PyAV's is a call into Python: few and large
# Of the hash of a content: SHA-256, which processors compute in hardware (1.7 GB/s on one core of
# an AMD EPYC where blake2b makes 0.85 GB/s), of pieces hashed in parallel.
PIECE_BYTES = 4 << 20  # part of the definition: other pieces, another hash
# What is fetched before it is hashed, so that the disk is at work while pieces are hashed: threads
# that read pieces each for itself took 1.5 times as long as one that reads from start to end.
AHEAD_BYTES = 64 << 20
ADVICE_BYTES = 1 << 20  # Linux takes about as much of one request and leaves out the rest
MAX_THREADS = 4  # the packet pass beside them copies at most as fast as these hash
ID_BYTES = 16
MAX_HASHES = 4096  # remembered by this process
# File systems round times by up to this much: a file written so shortly ago can be written again
# without another change time, so nothing is remembered of it.
SETTLE_SECONDS = 2.0
WINDOW_BYTES = 1 << 16
# What a demuxer may read of a content, beyond its size and as much again, before it is open: one
# whose index names the same bytes many times would read, and keep, more and more.
OPENING_READ_BYTES = 16 << 20

# (device, inode, size, mtime_ns, ctime_ns): a write, a rename over it or a restore of the
# modification time all change at least one of them.
FileIdentity = tuple[int, int, int, int, int]
# Gets a part of a content and the byte that it begins at.
Look = Callable[[int, memoryview], None]
pass_by: Look = lambda start, data: None  # noqa: E731
_hashes: dict[FileIdentity, str] = {}


def file_identity(path: Path) -> FileIdentity:
    """The identity of the file at `path` now; OSError when it is gone."""
    s = path.stat()
    return (s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns)


class Media:
    """One media content, a path or bytes, that can be opened any number of times.

    name: how messages call it. num_bytes: its size. A path must be a readable, non-empty
    regular file. settled: what is learned of the content may be remembered for the identity.
    opening: the call that it is opened for.
    demuxer, demuxer_options: FFmpeg's demuxer where the content does not say it.
    Raises ValueError otherwise, and for more than `max_bytes`.
    """

    def __init__(self, content: Path | bytes, opening: Opening | None = None) -> None:
        self.opening = opening or Opening()
        self.demuxer: str | None = None
        self.demuxer_options: dict[str, str] = {}
        self.path: Path | None = None
        self.data = b""
        self.identity: FileIdentity | None = None
        self.settled = True
        self._id: str | None = None
        if isinstance(content, bytes):
            self.name, self.num_bytes = f"{len(content)} bytes", len(content)
            require_video(len(content) > 0, "not be empty", "0 bytes")
            self.data = content
            self.opening.check_bytes(self.num_bytes, self.name)
            return
        self.path, self.name = content, repr(str(content))
        rule = "the path of an existing video or image file"
        try:
            self.identity = file_identity(content)
            require_video(content.is_file(), f"be {rule}", self.name)
            self.num_bytes = self.identity[2]
            require_video(self.num_bytes > 0, "not be empty", self.name)
            self.opening.check_bytes(self.num_bytes, self.name)
            content.open("rb", buffering=0).close()  # whether it may be read
        except BadMedia:
            raise
        except (OSError, ValueError) as error:
            # OSError: missing, no permission, name too long; ValueError: a NUL in the name.
            reason = getattr(error, "strerror", None) or str(error)
            raise BadMedia(
                f"open_video: video must be {rule}, got {str(content)!r} ({reason})"
            ) from error
        self.settled = time.time() - self.identity[4] / 1e9 >= SETTLE_SECONDS

    def check_usable(self, is_closed: bool) -> None:
        """RuntimeError for a source of it that was closed, and as `check_unchanged`."""
        if is_closed:
            raise RuntimeError(f"the video {self.name} was closed: open it again")
        self.check_unchanged()

    def check_unchanged(self) -> None:
        """RuntimeError when the file is no longer the one that was opened."""
        if self.path is None:
            return
        try:
            same = file_identity(self.path) == self.identity
        except OSError:
            same = False
        if not same:
            raise RuntimeError(
                f"the video {self.name} was changed or removed while it was open: open it again"
            )

    def content_id(self, look: Look = pass_by) -> str:
        """Hash of the whole content, 32 hex digits; computed, with `look`, unless it is known."""
        known = self.known_id()
        if known is None:
            known = content_hash(self._file, self.num_bytes, self.opening.check_time, look)
            self.check_unchanged()
        self.remember_id(known)
        return known

    def read_ahead(self) -> None:
        """Has the system begin to fetch a file."""
        with self._file() as file:
            read_ahead(file, 0, AHEAD_BYTES)

    def known_id(self) -> str | None:
        """`content_id` where it takes no reading: known here, or to this process by identity."""
        if self._id is None and self.identity is not None:
            return _hashes.get(self.identity)
        return self._id

    def remember_id(self, content_id: str) -> None:
        self._id = content_id
        if self.identity is not None and self.settled:
            if len(_hashes) >= MAX_HASHES:
                _hashes.clear()
            _hashes[self.identity] = content_id

    def open(self) -> Any:
        """A new av input container on the content; ValueError when it is no usable media.

        PyAV gets a reader without a name, so that formats are told by content alone (by name,
        a text file is a "tty" video and `%03d` a pattern) and a path behaves as its bytes do.
        """
        reader = self.reader()
        self.check_unchanged()
        reader.bytes_left = 2 * self.num_bytes + OPENING_READ_BYTES
        with av_errors(self.name):
            container = av.open(
                reader,
                "r",
                format=self.demuxer,
                buffer_size=READ_BYTES,
                options=self.codec_options,
                container_options={"protocol_whitelist": "none", **self.demuxer_options},
            )
        reader.bytes_left = None
        for stream in container.streams.video:
            if stream.codec_context is not None:
                stream.codec_context.options = self.codec_options
        nested = bool(NESTED_FORMATS & set(container.format.name.split(",")))
        got = f"{self.name} ({container.format.name})"
        require_video(not nested, "be a self-contained media file", got)
        return container

    @property
    def codec_options(self) -> dict[str, str]:
        """A codec of FFmpeg refuses larger frames before it makes room for them."""
        return {"max_pixels": str(self.opening.limits.max_pixels)}

    def reader(self) -> Reader:
        """The content from its start; OSError where the file cannot be opened."""
        return Reader(self._file(buffering=0), self)

    def _file(self, buffering: int = -1) -> Any:
        return io.BytesIO(self.data) if self.path is None else self.path.open("rb", buffering)


class Window:
    """A content, of which what was read last is kept.

    file: with read and seek; what `read` raises ends the reading. num_bytes: its size.
    """

    def __init__(self, file: Any, num_bytes: int) -> None:
        self._file, self.num_bytes = file, num_bytes
        self._start, self._data = 0, b""

    def at(self, start: int, length: int) -> bytes:
        """Bytes [start, start + length), fewer at the end of the content."""
        first = start - self._start
        if first < 0 or first + length > len(self._data):
            length = max(min(length, self.num_bytes - start), 0)
            if not length:
                return b""
            self._file.seek(start)
            self._data = self._read(max(length, WINDOW_BYTES))
            self._start, first = start, 0
        return self._data[first : first + length]

    def number(self, start: int, length: int, order: str = "big") -> int:
        """An unsigned integer; bytes beyond the end count as absent."""
        return int.from_bytes(self.at(start, length), "big" if order == "big" else "little")

    def search(self, pattern: re.Pattern[bytes], start: int) -> int | None:
        """Where `pattern`, of two bytes, matches next at or after `start`."""
        while start + 2 <= self.num_bytes:
            data = self.at(start, min(1 << 20, self.num_bytes - start))
            if (match := pattern.search(data)) is not None:
                return start + match.start()
            if len(data) < 2:
                return None
            start += len(data) - 1
        return None

    def _read(self, length: int) -> bytes:
        """As many bytes as there are: a read of an unbuffered file may give fewer."""
        parts: list[bytes] = []
        while length > 0 and (part := self._file.read(length)):
            parts.append(part)
            length -= len(part)
        return b"".join(parts)


class Reader:
    """What PyAV needs of a file, without its name; closed when the container lets go of it.

    bytes_left: what may still be read, None for all.
    """

    def __init__(self, file: Any, media: Media) -> None:
        self._file, self._media = file, media
        self.bytes_left: int | None = None
        self.seek, self.tell = file.seek, file.tell

    def read(self, num_bytes: int = -1) -> bytes:
        self._media.opening.check_time()
        data: bytes = self._file.read(num_bytes)
        if self.bytes_left is not None:
            self.bytes_left -= len(data)
            rule = "have an index that names no bytes many times"
            require_video(self.bytes_left >= 0, rule, self._media.name)
        return data

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


def read_ahead(file: Any, start: int, length: int) -> None:
    """Has the system fetch a part of a file beforehand, where it does that."""
    if hasattr(os, "posix_fadvise") and not isinstance(file, io.BytesIO):
        for place in range(start, start + length, ADVICE_BYTES):
            with suppress(OSError):  # a hint
                os.posix_fadvise(file.fileno(), place, ADVICE_BYTES, os.POSIX_FADV_WILLNEED)


def content_hash(
    open_content: Callable[[], Any], num_bytes: int, check: Callable[[], None], look: Look = pass_by
) -> str:
    """32 hex digits: SHA-256 of the SHA-256s of the pieces of 4 MiB, the first 16 bytes.

    open_content: opens the content, of `num_bytes`, anew. check: called before every piece is read;
    what it raises ends the work. look: called with every piece and where it begins, by several
    threads; it must not keep the piece. OSError where it cannot be read.
    """
    digests = [b""] * -(-num_bytes // PIECE_BYTES)
    threads = min(MAX_THREADS, os.cpu_count() or 1, len(digests))

    def hash_pieces(first: int) -> None:
        buffer = memoryview(bytearray(min(PIECE_BYTES, num_bytes)))
        with open_content() as file:
            for n in range(first, len(digests), threads):
                check()
                place = n * PIECE_BYTES
                read_ahead(file, place + AHEAD_BYTES, PIECE_BYTES)
                file.seek(place)
                data = buffer[: file.readinto(buffer)]
                digests[n] = hashlib.sha256(data).digest()
                look(place, data)

    if threads == 1:
        hash_pieces(0)
    else:
        with ThreadPoolExecutor(threads, "vtts_rt-hash") as pool:
            list(pool.map(hash_pieces, range(threads)))
    return hashlib.sha256(b"".join(digests)).digest()[:ID_BYTES].hex()


@contextmanager
def av_errors(name: str) -> Iterator[None]:
    """Turns whatever PyAV raises about a content into a ValueError that names it."""
    try:
        yield
    except (av.FFmpegError, OSError, UnicodeError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise BadMedia(
            f"open_video: video must be a readable video or image, got {name} ({reason})"
        ) from error


def video_stream(container: Any, name: str) -> Any:
    """The video stream that FFmpeg ranks best (av_find_best_stream), but no cover art;
    ValueError when there is none."""
    streams = [
        s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic
    ]
    kind = "audio-only file" if container.streams.audio else "file without one"
    require_video(bool(streams), "hold a video stream", f"{kind} {name}")
    best = container.streams.best("video")
    stream = best if best in streams else streams[0]
    known = stream.codec_context is not None
    require_video(known, "be of a codec that can be decoded", name)
    return stream


def demuxed(container: Any, stream: Any) -> Any:
    """The packets of a stream that hold data; a broken tail ends them, as the end of file does."""
    try:
        for packet in container.demux(stream):
            if packet.size:
                yield packet
    except (av.FFmpegError, OSError):
        return
