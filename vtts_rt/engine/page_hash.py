"""Names for KV pages that every machine computes alike, so that a service can send a request to
the machine that holds its prefix.

    h[-1] = H("vtts-kv-space-v1", namespace)
    h[i]  = H("vtts-kv-page-v1", h[i-1] + keys of page i)

H is BLAKE2b (RFC 7693) of 16 bytes with the given personalisation, padded with zeros; keys are
little-endian int64, row by row. A hash names a page and everything before it. `vtts.h` computes
the same (`vtts_page_hashes`). A hit on a machine is still verified there: prefix_tree.py compares
the keys themselves.

Legend: N tokens, P page_size.
"""

from __future__ import annotations

from hashlib import blake2b

import numpy as np

from vtts_rt.types import PixelBox, require

HASH_BYTES = 16
_SPACE = b"vtts-kv-space-v1"
_PAGE = b"vtts-kv-page-v1"
_CONTENT = b"vtts-content-v1"
_CONTENT_STRIDE = 1 << 20  # tokens that one content id spans, as in sequence.py


def page_hashes(keys: np.ndarray, page_size: int, namespace: bytes = b"") -> list[bytes]:
    """Hashes of the N // P full pages of a prompt, 16 bytes each.

    keys: (N, 4) int64: token or content id, then M-RoPE t, h, w. namespace: a version of the
    language model's weights, or anything else that must not share KV.
    """
    shaped = keys.ndim == 2 and keys.shape[1] == 4 and keys.dtype == np.int64
    require("page_hashes", "keys", f"{keys.shape} {keys.dtype}", shaped, "(N, 4) int64")
    require("page_hashes", "page_size", page_size, page_size >= 1, ">= 1")
    data = keys.astype("<i8", copy=False).tobytes()
    stride = page_size * 4 * 8
    digest = blake2b(namespace, digest_size=HASH_BYTES, person=_SPACE).digest()
    hashes = []
    for page in range(len(keys) // page_size):
        part = data[page * stride : (page + 1) * stride]
        digest = blake2b(digest + part, digest_size=HASH_BYTES, person=_PAGE).digest()
        hashes.append(digest)
    return hashes


def content_id(name: bytes) -> int:
    """The key of a vision token 0; token i has the key `content_id - i`, i < 2^20. Negative."""
    digest = blake2b(name, digest_size=8, person=_CONTENT).digest()
    return -1 - (int.from_bytes(digest, "little") >> 21 << 20)


def pair_name(
    video_id: str, frame_a: int, frame_b: int, box: PixelBox, resized_hw: tuple[int, int]
) -> bytes:
    """What names the picture of a frame pair: `<video_id> a b x0 y0 x1 y1 height width`."""
    numbers = (frame_a, frame_b, *box, *resized_hw)
    return " ".join([video_id, *map(str, numbers)]).encode()
