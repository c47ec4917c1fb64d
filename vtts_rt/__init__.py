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

_MODULES = {
    "vtts_rt.config": ("EngineConfig", "MediaLimits", "PerceptionConfig", "RuntimeConfig"),
    "vtts_rt.data.feed": ("RolloutDataFeed",),
    "vtts_rt.engine.shared_weights": ("export_weights",),
    "vtts_rt.errors": ("Aborted", "BadMedia", "BadRequest", "Overloaded"),
    "vtts_rt.perception.clue": ("Clue",),
    "vtts_rt.rounds.ask": ("Answerer", "Ask"),
    "vtts_rt.rounds.results": ("Answer", "Reply"),
    "vtts_rt.rounds.rollouts": ("RolloutGroup",),
    "vtts_rt.rounds.transcript": ("Transcript",),
    "vtts_rt.runtime": ("Runtime",),
    "vtts_rt.sdk": (
        "get_cmake_dir",
        "get_include_dir",
        "get_lib_dir",
        "get_library",
        "get_pkgconfig_dir",
    ),
    "vtts_rt.types": ("Box", "Region", "SamplingParams", "TimeSpan"),
    "vtts_rt.video": ("FrameStore", "Video", "open_video"),
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
    "Reply",
    "RolloutDataFeed",
    "RolloutGroup",
    "Runtime",
    "RuntimeConfig",
    "SamplingParams",
    "TimeSpan",
    "Transcript",
    "Video",
    "__version__",
    "export_weights",
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
    from vtts_rt.engine.shared_weights import export_weights
    from vtts_rt.errors import Aborted, BadMedia, BadRequest, Overloaded
    from vtts_rt.perception.clue import Clue
    from vtts_rt.rounds.ask import Answerer, Ask
    from vtts_rt.rounds.results import Answer, Reply
    from vtts_rt.rounds.rollouts import RolloutGroup
    from vtts_rt.rounds.transcript import Transcript
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
    for module, names in _MODULES.items():
        if name in names:
            import importlib

            value = globals()[name] = getattr(importlib.import_module(module), name)
            return value
    raise AttributeError(f"module 'vtts_rt' has no attribute {name!r}")


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
