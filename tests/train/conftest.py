from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from grpo_tools import write_questions

from vtts_rt import EngineConfig, Runtime


@pytest.fixture(scope="module")
def manifest(clips: list[Path]) -> Path:
    return write_questions(clips)


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    with Runtime.from_pretrained("tiny", engine=EngineConfig(kv_bytes=1 << 26)) as runtime:
        yield runtime
