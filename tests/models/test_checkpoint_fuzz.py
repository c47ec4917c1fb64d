"""Damaged and lying checkpoint files: one sentence each, and no memory for what is not there."""

from __future__ import annotations

import json
import random
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from utils import tiny_checkpoint, tiny_qwen2_5_vl, tiny_qwen3_vl

from vtts_rt.models.registry import load_model

# Values that JSON can hold where something else is expected.
VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 7, 10**6, 10**12, 2**63, 10**30, 0.5, -0.0, 1e308),
    *(float("nan"), float("inf"), "", "x", "silu", "../x", "model.safetensors", "\u0000", [], [0]),
    *([1, 2, 3], [10**9] * 3, {}, {"a": {}}, [[]], "float64", "auto", "default", "yarn"),
]
# Loading may take this much memory above what loading the sound checkpoint takes.
MOST_BYTES = 256 << 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    return sound(tmp_path_factory.mktemp("sound"), tiny_qwen2_5_vl)


def sound(folder: Path, family: Callable[..., Any]) -> Path:
    tiny_checkpoint(folder, family)
    family().save_pretrained(folder / "shards", max_shard_size="200KB")
    load_model(folder)
    return folder


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) of a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, child in list(items):
        yield value, key
        if isinstance(child, (dict, list)):
            yield from places(child)


def mutate(rng: random.Random, value: Any) -> None:
    for _ in range(rng.choice((1, 1, 2, 3))):
        container, key = rng.choice(list(places(value)))
        if rng.random() < 0.15:
            del container[key]
        else:
            container[key] = rng.choice(VALUES)


def scramble(rng: random.Random, raw: bytes) -> bytes:
    """Some bytes changed, dropped or cut off, most of them near the start."""
    data = bytearray(raw)
    for _ in range(rng.choice((1, 1, 4, 16))):
        at = min(int(rng.expovariate(1 / 2000)), len(data) - 1)
        data[at] = rng.randrange(256)
    if rng.random() < 0.2:
        del data[rng.randrange(len(data)) :]
    return bytes(data)


def relabel(rng: random.Random, raw: bytes) -> bytes:
    """A safetensors file with another header."""
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    mutate(rng, header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + raw[8 + size :]


def loads_or_says_why(folder: Path) -> bool:
    """Whether a folder loads; else it must be refused in one sentence of ours."""
    try:
        load_model(folder)
    except ValueError as error:
        assert " must be " in str(error) or " must fit " in str(error), str(error)
        return False
    return True


def check(folder: Path, work: Path, seed: int) -> bool:
    rng = random.Random(seed)
    kind = rng.choice(("config", "generation", "index", "header", "bytes"))
    source = folder / "shards" if kind == "index" else folder
    shutil.copytree(source, work, ignore=shutil.ignore_patterns("shards"))
    name = {
        "config": "config.json",
        "generation": "generation_config.json",
        "index": "model.safetensors.index.json",
    }.get(kind, "model.safetensors")
    path = work / name
    if kind in ("header", "bytes"):
        change = relabel if kind == "header" else scramble
        path.write_bytes(change(rng, path.read_bytes()))
    elif rng.random() < 0.1:
        path.write_bytes(scramble(rng, path.read_bytes()))
    else:
        value = json.loads(path.read_text())
        mutate(rng, value)
        path.write_text(json.dumps(value))
    return loads_or_says_why(work)


def check_many(folder: Path, tmp_path: Path, seeds: range) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    loaded = 0
    for seed in seeds:
        try:
            loaded += check(folder, tmp_path / "case", seed)
        except Exception as error:
            raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error
        shutil.rmtree(tmp_path / "case")
    assert 0 < loaded < len(seeds)
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    assert grown < MOST_BYTES


def test_damaged_files_load_or_are_refused(folder: Path, tmp_path: Path) -> None:
    check_many(folder, tmp_path, range(60))


@pytest.mark.slow
def test_many_damaged_files_load_or_are_refused(folder: Path, tmp_path: Path) -> None:
    check_many(folder, tmp_path, range(60, 4000))


@pytest.mark.slow
def test_many_damaged_files_of_qwen3_vl(tmp_path: Path) -> None:
    check_many(sound(tmp_path / "sound", tiny_qwen3_vl), tmp_path, range(800))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "must be a readable JSON file"),
        ('{"a":' * 100_000, "must be a readable JSON file"),
        ("9" * 10_000, "must be a readable JSON file"),
        ("\ud800".encode("utf-8", "surrogatepass"), "must be a readable JSON file"),
        ("[]", "must be an object"),
    ],
)
def test_json_that_is_no_config(
    folder: Path, tmp_path: Path, text: str | bytes, message: str
) -> None:
    shutil.copy(folder / "model.safetensors", tmp_path)
    (tmp_path / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path)
