"""The hash of a content: pieces hashed in parallel, then their hashes.

SHA-256, which processors of the last years compute in hardware: 1.7 GB/s on one core of an AMD EPYC
where blake2b makes 0.85 GB/s.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

PIECE_BYTES = 4 << 20  # part of the definition: other pieces, another hash
READ_BYTES = 1 << 20
MAX_THREADS = 4  # the packet pass beside them copies at most as fast as these hash
ID_BYTES = 16


def _unchecked() -> None:
    """For callers that nothing ends."""


def hash_bytes(data: bytes, check: Callable[[], None] = _unchecked) -> str:
    """32 hex digits: SHA-256 of the SHA-256s of the pieces of 4 MiB, the first 16 bytes.

    check: called before every piece; what it raises ends the work.
    """
    view = memoryview(data)

    def piece(start: int) -> bytes:
        check()
        return hashlib.sha256(view[start : start + PIECE_BYTES]).digest()

    return _joined(piece, len(data))


def hash_file(path: Path, num_bytes: int, check: Callable[[], None] = _unchecked) -> str:
    """`hash_bytes` of the first `num_bytes` of a file, read once and in order, 1 MiB at a time.

    check: called before every read. OSError where it cannot be read.
    """
    with path.open("rb", buffering=0) as file:
        number = file.fileno()

        def piece(start: int) -> bytes:
            digest = hashlib.sha256()
            end = min(start + PIECE_BYTES, num_bytes)
            while start < end:
                check()
                part = os.pread(number, min(READ_BYTES, end - start), start)
                if not part:
                    break
                digest.update(part)
                start += len(part)
            return digest.digest()

        return _joined(piece, num_bytes)


def _joined(piece: Callable[[int], bytes], num_bytes: int) -> str:
    starts = range(0, num_bytes, PIECE_BYTES)
    if len(starts) <= 1:
        digests = [piece(start) for start in starts]
    else:
        threads = min(MAX_THREADS, os.cpu_count() or 1, len(starts))
        with ThreadPoolExecutor(threads, "vtts_rt-hash") as pool:
            digests = list(pool.map(piece, starts))
    return hashlib.sha256(b"".join(digests)).digest()[:ID_BYTES].hex()
