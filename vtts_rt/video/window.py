"""Bytes of a content by their place, for what reads headers before a demuxer does."""

from __future__ import annotations

import re
from typing import Any

WINDOW_BYTES = 1 << 16


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
