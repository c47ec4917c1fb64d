"""Tiers of the vision cache: features in device or host memory, and in files.

Every tier is a byte-budget LRU that hands what it evicts to the tier below.
"""

from __future__ import annotations

import hashlib
import json
import logging
import operator
import os
import re
import time
import uuid
import zlib
from collections import OrderedDict
from collections.abc import Hashable
from contextlib import suppress
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

logger = logging.getLogger(__name__)

_FORMAT = "vtts_rt features 1"
# Only files of these names are ever read, counted or deleted: others may lie in the folder.
_FILE = re.compile(r"[0-9a-f]{64}\.features\.safetensors")
_TEMPORARY = re.compile(r"[0-9a-f]{64}\.features\.safetensors\.[0-9a-f]{32}\.tmp")
_TEMPORARY_SECONDS = 3600.0  # older ones were left by a process that ended
# The folder is read again after writing this part of the budget, so that processes that share it
# exceed it together by no more than this much each.
_READS_PER_BUDGET = 16


class MemoryTier:
    """Features in the memory of one device. Exclusive: what moves up leaves this tier.

    pinned: ids of videos (`key[0]`) whose features are not evicted, one entry a pin; where they
    fill the budget, others go to the tier below.
    """

    def __init__(
        self, byte_budget: int, device: torch.device, below: MemoryTier | DiskTier | None
    ) -> None:
        self.byte_budget = byte_budget
        self.num_bytes = self.hits = self.evictions = 0
        self.pinned: list[str] = []
        self._device = device
        self._below = below
        self._features: OrderedDict[Hashable, Tensor] = OrderedDict()

    def __contains__(self, key: Hashable) -> bool:
        return key in self._features

    def get(self, key: Hashable) -> Tensor | None:
        features = self._features.get(key)
        if features is not None:
            self.hits += 1
            self._features.move_to_end(key)
        return features

    def take(self, key: Hashable) -> Tensor | None:
        """As `get`, and forget them here."""
        features = self.get(key)
        self.discard(key)
        return features

    def discard(self, key: Hashable) -> None:
        features = self._features.pop(key, None)
        if features is not None:
            self.num_bytes -= features.nbytes

    def put(self, key: Hashable, features: Tensor) -> None:
        """Keep features, which own their memory; what is too large goes to the tier below."""
        size = features.nbytes
        if size > self.byte_budget:
            if self._below is not None:
                self._below.put(key, features)
            return
        while self.num_bytes + size > self.byte_budget:
            oldest = next((k for k in self._features if not self._is_pinned(k)), None)
            if oldest is None:
                if self._below is not None:
                    self._below.put(key, features)
                return
            evicted = self._features.pop(oldest)
            self.num_bytes -= evicted.nbytes
            self.evictions += 1
            if self._below is not None:
                self._below.put(oldest, evicted)
        self._features[key] = features.to(self._device)
        self.num_bytes += size

    def _is_pinned(self, key: Any) -> bool:
        return bool(self.pinned) and key[0] in self.pinned

    def clear(self) -> None:
        self._features.clear()
        self.num_bytes = 0

    def stats(self) -> dict[str, int]:
        return {
            "hits": self.hits,
            "evictions": self.evictions,
            "pairs": len(self._features),
            "bytes": self.num_bytes,
        }

    def check_integrity(self) -> None:
        assert self.num_bytes == sum(f.nbytes for f in self._features.values())
        assert self.num_bytes <= self.byte_budget


class DiskTier:
    """Features in files of one folder, which other processes may share and which outlive this one.

    A file stays when its features move up: they never change, so moving down again is free.
    Its name is a hash of the key, its metadata hold the key itself, which is compared, and a
    checksum. Age is the time of the file's last use (mtime). Whatever is wrong with a file makes
    it a miss, and it is deleted (`damaged`); a folder that cannot be written to is only read.
    """

    def __init__(self, byte_budget: int, path: str) -> None:
        self.byte_budget = byte_budget
        self.hits = self.evictions = self.damaged = 0
        self._folder = Path(path).expanduser()
        self._num_bytes = self._unread = 0  # in the folder, and written since it was read
        self._writable = True
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._trim(byte_budget)
        except OSError as error:
            self._give_up(error)

    def __contains__(self, key: Hashable) -> bool:
        try:
            return self._path(key_text(key)).exists()
        except OSError:
            return False

    def take(self, key: Hashable) -> Tensor | None:
        """Features of `key` on the CPU, checked, or None."""
        text = key_text(key)
        path = self._path(text)
        try:
            data = path.read_bytes() if path.stat().st_size <= self.byte_budget else b""
        except FileNotFoundError:
            return None
        except OSError:
            data = b""
        features = _decoded(data, text)
        if features is None:
            self.damaged += 1
            _delete(path)
            return None
        self.hits += 1
        _touch(path)
        return features

    def put(self, key: Hashable, features: Tensor) -> None:
        """Write features unless their file is there; deletes the oldest files beyond the budget."""
        text = key_text(key)
        path = self._path(text)
        if not self._writable:
            return
        temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
        try:
            if path.exists():
                _touch(path)
                return
            data = _encoded(features, text)
            size = len(data)
            if size > self.byte_budget:
                return
            self._folder.mkdir(parents=True, exist_ok=True)
            spare = self.byte_budget // _READS_PER_BUDGET
            if self._unread + size > spare or self._num_bytes + size > self.byte_budget:
                self._trim(self.byte_budget - max(size, spare))
            temporary.write_bytes(data)
            temporary.replace(path)
            self._num_bytes += size
            self._unread += size
        except OSError as error:
            _delete(temporary)
            self._give_up(error)

    def stats(self) -> dict[str, int]:
        """Reads the folder: pairs and bytes are those of all processes."""
        sizes = [size for _, _, size in self._files()]
        return {
            "hits": self.hits,
            "evictions": self.evictions,
            "damaged": self.damaged,
            "pairs": len(sizes),
            "bytes": sum(sizes),
        }

    def check_integrity(self) -> None:
        assert self._num_bytes <= self.byte_budget

    def _path(self, text: str) -> Path:
        return self._folder / f"{hashlib.sha256(text.encode()).hexdigest()}.features.safetensors"

    def _files(self) -> list[tuple[int, Path, int]]:
        """(last use, path, bytes) of the folder's files, oldest first. Deletes what a process that
        ended while writing has left."""
        found = []
        with suppress(OSError):
            for path in self._folder.iterdir():
                with suppress(OSError):  # deleted meanwhile
                    status = path.stat()
                    if _FILE.fullmatch(path.name):
                        found.append((status.st_mtime_ns, path, status.st_size))
                    elif (
                        _TEMPORARY.fullmatch(path.name)
                        and time.time() - status.st_mtime > _TEMPORARY_SECONDS
                    ):
                        path.unlink()
        return sorted(found)

    def _trim(self, most_bytes: int) -> None:
        """Read the folder and delete the oldest files beyond `most_bytes`."""
        files = self._files()
        self._num_bytes, self._unread = sum(size for _, _, size in files), 0
        for _, path, size in files:
            if self._num_bytes <= most_bytes:
                break
            _delete(path)
            self._num_bytes -= size
            self.evictions += 1

    def _give_up(self, error: OSError) -> None:
        self._writable = False
        logger.warning("vision cache: %s is not written to any more: %s", self._folder, error)


def _delete(path: Path) -> None:
    with suppress(OSError):
        path.unlink()


def _touch(path: Path) -> None:
    with suppress(OSError):  # another user's file stays as old as it is
        os.utime(path)


def key_text(key: Hashable) -> str:
    """A key of nested tuples of str and int as text: the same for equal keys only, on every
    machine. TypeError for anything else inside."""
    return json.dumps(_plain(key), separators=(",", ":"))


def _plain(key: Any) -> Any:
    if isinstance(key, str):
        return key
    return [_plain(item) for item in key] if isinstance(key, tuple) else operator.index(key)


def _encoded(features: Tensor, key: str) -> bytes:
    features = features.cpu().contiguous()
    metadata = {"format": _FORMAT, "key": key, "checksum": _checksum(features)}
    data: bytes = safetensors.torch.save({"features": features}, metadata)
    return data


def _decoded(data: bytes, key: str) -> Tensor | None:
    """What `_encoded` gave, or None if `data` is anything else, whatever that is."""
    try:
        length = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + length])["__metadata__"]
        if (metadata["format"], metadata["key"]) != (_FORMAT, key):
            return None
        features = safetensors.torch.load(data)["features"]
        return features if metadata["checksum"] == _checksum(features) else None
    except Exception:  # bytes from outside: json, safetensors and torch fail in many ways
        return None


def _checksum(features: Tensor) -> str:
    """CRC-32 of shape, dtype and values: what a crash or a bad sector damages."""
    shape = f"{tuple(features.shape)} {features.dtype}".encode()
    values = features.reshape(-1).view(torch.uint8).numpy().data
    return f"{zlib.crc32(values, zlib.crc32(shape)):08x}"
