"""vtts_rt: visual test-time scaling for video language models: decode, encode and prefill once.

Public names load on first use (PEP 562), so importing a leaf never pulls in the runtime.
"""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "Runtime": "vtts_rt.runtime",
    "Answer": "vtts_rt.rounds.results",
    "Answerer": "vtts_rt.rounds.ask",
    "Ask": "vtts_rt.rounds.ask",
    "PerceptionConfig": "vtts_rt.config",
    "EngineConfig": "vtts_rt.config",
    "MediaLimits": "vtts_rt.config",
    "RuntimeConfig": "vtts_rt.config",
    "SamplingParams": "vtts_rt.types",
    "Aborted": "vtts_rt.errors",
    "BadMedia": "vtts_rt.errors",
    "BadRequest": "vtts_rt.errors",
    "Overloaded": "vtts_rt.errors",
    "Region": "vtts_rt.types",
    "Box": "vtts_rt.types",
    "TimeSpan": "vtts_rt.types",
    "Clue": "vtts_rt.perception.clue",
    "FrameStore": "vtts_rt.video",
    "Video": "vtts_rt.video",
    "RolloutDataFeed": "vtts_rt.data.feed",
    "open_video": "vtts_rt.video",
    "get_cmake_dir": "vtts_rt.sdk",
    "get_include_dir": "vtts_rt.sdk",
    "get_lib_dir": "vtts_rt.sdk",
    "get_library": "vtts_rt.sdk",
    "get_pkgconfig_dir": "vtts_rt.sdk",
}
__all__ = [
    "Aborted",
    "Answer",
    "Answerer",
    "Ask",
    "BadMedia",
    "BadRequest",
    "Box",
    "Clue",
    "EngineConfig",
    "FrameStore",
    "MediaLimits",
    "Overloaded",
    "PerceptionConfig",
    "Region",
    "RolloutDataFeed",
    "Runtime",
    "RuntimeConfig",
    "SamplingParams",
    "TimeSpan",
    "Video",
    "__version__",
    "get_cmake_dir",
    "get_include_dir",
    "get_lib_dir",
    "get_library",
    "get_pkgconfig_dir",
    "open_video",
]

if TYPE_CHECKING:
    from vtts_rt.config import EngineConfig, MediaLimits, PerceptionConfig, RuntimeConfig
    from vtts_rt.data.feed import RolloutDataFeed
    from vtts_rt.errors import Aborted, BadMedia, BadRequest, Overloaded
    from vtts_rt.perception.clue import Clue
    from vtts_rt.rounds.ask import Answerer, Ask
    from vtts_rt.rounds.results import Answer
    from vtts_rt.runtime import Runtime
    from vtts_rt.sdk import (
        get_cmake_dir,
        get_include_dir,
        get_lib_dir,
        get_library,
        get_pkgconfig_dir,
    )
    from vtts_rt.types import Box, Region, SamplingParams, TimeSpan
    from vtts_rt.video import FrameStore, Video, open_video


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'vtts_rt' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


LOG_LEVELS = ("debug", "info", "warning", "error", "critical")


class _UnlessConfigured(logging.StreamHandler[Any]):
    """Writes to stderr as long as the application has no handler of its own."""

    def emit(self, record: logging.LogRecord) -> None:
        if not logging.getLogger().handlers:
            super().emit(record)


def _follow_log_variable() -> None:
    """VTTS_RT_LOG: the level of the logger `vtts_rt`, and its lines on stderr."""
    level = os.environ.get("VTTS_RT_LOG", "")
    if level and level.lower() not in LOG_LEVELS:
        names = ", ".join(LOG_LEVELS)
        warnings.warn(f"VTTS_RT_LOG must be one of {names}, got {level!r}", stacklevel=3)
    elif level:
        handler = _UnlessConfigured()
        handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
        logger = logging.getLogger("vtts_rt")
        logger.addHandler(handler)
        logger.setLevel(level.upper())


def _tell_of_a_shadow() -> None:
    """Say once that a source tree that was never built stands before the installed package."""
    here = Path(__file__).resolve().parent
    if (here / "_build_info.py").exists():
        return
    from importlib.metadata import PackageNotFoundError, distribution

    try:
        installed = Path(str(distribution("vtts_rt").locate_file("vtts_rt"))).resolve()
    except PackageNotFoundError:
        return
    if installed != here and (installed / "_build_info.py").exists():
        warnings.warn(
            f"the source tree {here.parent} stands before the package installed in "
            f"{installed.parent}: its native code and kernels are not used; run elsewhere, or "
            f"`pip install -e .` there",
            stacklevel=3,
        )


_follow_log_variable()
_tell_of_a_shadow()
