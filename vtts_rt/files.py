"""Files that are whole or not there, whenever a process is killed."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path in the same folder, of the same suffix, to write a file to: it takes the place of
    `path` at the end, in one step, and is deleted after an error. What a killed process leaves is
    named `partial_<8 hex digits>_<name>`."""
    partial = path.with_name(f"partial_{uuid.uuid4().hex[:8]}_{path.name}")
    try:
        yield partial
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_whole(path: Path, text: str) -> None:
    """Write a text in UTF-8; a file that was there stays whole until the new one is."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")
