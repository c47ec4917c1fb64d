"""Choices that only a measurement can make: which backend is the fastest on a card, by shape.

vtts_rt/assets/dispatch.json maps the name of a card, as torch gives it, to rows of [op, size,
min_rows, backend]: from `min_rows` rows on, calls of `op` whose matrices or heads have `size`
outputs go to `backend`. bench/bench_<op>.py measures. A card that is not there was not measured:
the op's own first choice runs, and `vtts-rt env` says so.
"""

from __future__ import annotations

import json
from functools import lru_cache
from importlib.resources import files

import torch

from vtts_rt.ops.dispatch import Choice

Entry = tuple[str, int, int, str]  # op, size, min_rows, backend
_FILE = "assets/dispatch.json"


@lru_cache(maxsize=1)
def _entries() -> dict[str, list[Entry]]:
    found = json.loads(files("vtts_rt").joinpath(_FILE).read_text(encoding="utf-8"))
    return {
        card: [(str(op), int(size), int(rows), str(backend)) for op, size, rows, backend in entries]
        for card, entries in found.items()
    }


@lru_cache(maxsize=256)
def fastest(op: str, size: int, num_rows: int, device: torch.device) -> str | None:
    """The backend measured to be the fastest for such a call, None where nothing was measured."""
    fitting = [entry for entry in _found(op, size, device) if entry[2] <= num_rows]
    return max(fitting, key=lambda entry: entry[2])[3] if fitting else None


def possible(op: str, size: int, device: torch.device) -> set[str]:
    """The backends that `fastest` may name, whatever the number of rows."""
    return {backend for *_, backend in _found(op, size, device)}


def _found(op: str, size: int, device: torch.device) -> list[Entry]:
    if device.type != "cuda":
        return []
    entries = _entries().get(torch.cuda.get_device_name(device), [])
    return [entry for entry in entries if entry[:2] == (op, size)]


def choices(op: str, otherwise: str) -> list[Choice]:
    """Rows of `vtts-rt env` about an op; otherwise: the backend that runs unmeasured calls."""
    if not torch.cuda.is_available():
        return []
    card = torch.cuda.get_device_name()
    found = [
        Choice(f"{op} on cuda, {size} wide, from {rows} rows", backend, f"measured on {card}")
        for name, size, rows, backend in _entries().get(card, [])
        if name == op
    ]
    reason = f"nothing measured on {card}, see {_FILE}"
    return found or [Choice(f"{op} on cuda, by shape", otherwise, reason)]
