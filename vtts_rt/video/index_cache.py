"""The index cache: what opening learned about a video, for the next process that opens it.

Two kinds of entries in one SQLite file: a file's identity (device, inode, size, times) -> the hash
of its content, and a content's hash -> its `VideoFacts`. Each carries a checksum over its name and
value, so that a damaged one is built anew. The cache never fails its user: what goes wrong is
logged once, and the process goes on without it.

Its folder is `config.index_cache_folder`. A connection lives for one call, so that none crosses a
fork.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import av

from vtts_rt.config import index_cache_folder
from vtts_rt.video.container import Media
from vtts_rt.video.facts import VideoFacts

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Raise it whenever `build_index`, the content hash or the bytes of VideoFacts change.
INDEX_VERSION = 3
FILE_NAME = "index-1.sqlite3"  # the number is the version of the table
MAX_BYTES = 256 << 20  # of the file: some 200 videos of 2 h, or 50,000 short clips
LOCK_SECONDS = 5.0  # a write takes milliseconds
CHECK_BYTES = 16
TABLE = "CREATE TABLE IF NOT EXISTS entries (name TEXT PRIMARY KEY, value BLOB, used INTEGER)"


def known_facts(media: Media, source_fps: float | None) -> VideoFacts | None:
    """What an earlier opening learned; the content of a file is not read for it."""
    cache = _cache()
    if cache is None:
        return None
    content_id = media.content_id() if media.path is None else media.known_id()
    if content_id is None and media.settled:
        found = cache.get(_file_name(media))
        content_id = None if found is None else found.decode()
    if content_id is None:
        return None
    data = cache.get(_facts_name(content_id, source_fps))
    if data is None:
        return None
    media.remember_id(content_id)
    return VideoFacts.from_bytes(content_id, data)


def remember_facts(media: Media, source_fps: float | None, facts: VideoFacts) -> None:
    """For the next opening of the same content; a file that is being written is left out."""
    cache = _cache()
    if cache is None or not media.settled:
        return
    values = {_facts_name(facts.content_id, source_fps): facts.to_bytes()}
    if media.identity is not None:
        values[_file_name(media)] = facts.content_id.encode()
    cache.put(values)


def _file_name(media: Media) -> str:
    assert media.identity is not None, "only files have an identity"
    return f"file {INDEX_VERSION} " + " ".join(map(str, media.identity))


def _facts_name(content_id: str, source_fps: float | None) -> str:
    """Other demuxers may cut and time packets in another way."""
    libraries = [av.library_versions[name] for name in ("libavformat", "libavcodec")]
    rate = None if source_fps is None else float(source_fps)
    return f"facts {INDEX_VERSION} {content_id} {rate!r} {av.__version__} {libraries}"


def _cache() -> IndexCache | None:
    """The cache of the folder that the environment names now; None where it says "off"."""
    folder = index_cache_folder()
    return None if folder is None else _cache_in(folder)


@functools.lru_cache(maxsize=16)
def _cache_in(folder: Path) -> IndexCache:
    return IndexCache(folder)


class IndexCache:
    """Named bytes in `folder`, about `max_bytes` of file, oldest out first.

    Safe for threads, forked processes and any number of processes at once.
    """

    def __init__(self, folder: Path, max_bytes: int = MAX_BYTES) -> None:
        self._path = folder / FILE_NAME
        self._max_bytes = max_bytes
        self._usable = True

    def get(self, name: str) -> bytes | None:
        """The bytes last put under `name`; None when they are not there or are damaged."""

        def read(db: Any) -> bytes | None:
            row = db.execute("SELECT value FROM entries WHERE name = ?", (name,)).fetchone()
            if row is None or not isinstance(row[0], bytes):
                return None
            check, value = row[0][:CHECK_BYTES], row[0][CHECK_BYTES:]
            return value if check == _check(name, value) else None

        return self._run(read)

    def put(self, values: dict[str, bytes]) -> None:
        """All of `values` at once, or none when something goes wrong or they are too large."""
        if sum(map(len, values.values())) > self._max_bytes // 4:
            return
        now = int(time.time())
        rows = [(name, _check(name, value) + value, now) for name, value in values.items()]

        def write(db: Any) -> None:
            db.execute("BEGIN IMMEDIATE")
            db.executemany("INSERT OR REPLACE INTO entries VALUES (?, ?, ?)", rows)
            self._evict(db)
            db.execute("COMMIT")

        self._run(write)

    def _evict(self, db: Any) -> None:
        """The oldest tenths of the entries, until the rest fits."""
        oldest = "SELECT rowid FROM entries ORDER BY used, rowid LIMIT 1 + ?"
        while True:
            (pages,), (free,), (page_bytes,) = (
                db.execute(f"PRAGMA {name}").fetchone()
                for name in ("page_count", "freelist_count", "page_size")
            )
            if (pages - free) * page_bytes <= self._max_bytes:
                return
            num = db.execute("SELECT count(*) FROM entries").fetchone()[0] // 10
            db.execute(f"DELETE FROM entries WHERE rowid IN ({oldest})", (num,))

    def _run(self, task: Callable[[Any], T]) -> T | None:
        """`task` with a connection of its own; None once anything has failed."""
        if not self._usable:
            return None
        db = None
        try:
            db = _connect(self._path)
            return task(db)
        except Exception as error:  # whatever it is, videos open without the cache
            self._usable = False
            logger.warning(
                "the index cache %s cannot be used (%s): videos are indexed at every opening; "
                "remove that file, or set VTTS_RT_CACHE_DIR to another folder or to off",
                self._path,
                error,
            )
            return None
        finally:
            if db is not None:
                db.close()


def _connect(path: Path) -> Any:
    """A connection to the database at `path`, which is made where there is none.

    With a rollback journal: for connections of one call, a write-ahead log takes twice as long
    (0.30 ms a read for 0.13 ms). Without fsync: a killed process harms nothing, a machine that
    loses power at most the cache.
    """
    import sqlite3  # some builds of Python lack it

    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    db = sqlite3.connect(path, timeout=LOCK_SECONDS, isolation_level=None)
    try:
        db.execute("PRAGMA synchronous = OFF")
        db.execute(TABLE)
    except BaseException:
        db.close()
        raise
    return db


def _check(name: str, value: bytes) -> bytes:
    digest = hashlib.blake2b(digest_size=CHECK_BYTES)
    digest.update(name.encode() + b"\0")
    digest.update(value)
    return digest.digest()
