"""The hash of a content: pieces hashed in parallel, then their hashes.

SHA-256, which processors of the last years compute in hardware: 1.7 GB/s on one core of an AMD EPYC
where blake2b makes 0.85 GB/s.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO

PIECE_BYTES = 4 << 20  # part of the definition: other pieces, another hash
READ_BYTES = 1 << 20
MAX_THREADS = 4  # the packet pass beside them copies at most as fast as these hash
ID_BYTES = 16


def content_hash(
    open_content: Callable[[], BinaryIO], num_bytes: int, check: Callable[[], None]
) -> str:
    """32 hex digits: SHA-256 of the SHA-256s of the pieces of 4 MiB, the first 16 bytes.

    open_content: opens the content, of `num_bytes`, anew. check: called before every read of
    1 MiB; what it raises ends the work. OSError where it cannot be read.
    """

    def piece(start: int) -> bytes:
        digest = hashlib.sha256()
        with open_content() as file:
            file.seek(start)
            for _ in range(PIECE_BYTES // READ_BYTES):
                check()
                digest.update(file.read(READ_BYTES))
        return digest.digest()

    starts = range(0, num_bytes, PIECE_BYTES)
    threads = min(MAX_THREADS, os.cpu_count() or 1, len(starts))
    if threads == 1:
        digests = list(map(piece, starts))
    else:
        with ThreadPoolExecutor(threads, "vtts_rt-hash") as pool:
            digests = list(pool.map(piece, starts))
    return hashlib.sha256(b"".join(digests)).digest()[:ID_BYTES].hex()
