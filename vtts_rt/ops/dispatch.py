"""Which implementation of an op runs, and why.

An op registers its backends in order of preference. A backend says with `supports` whether it can
run a call: None, or the reason why not. `auto` takes the first that can and says so once in the
log; a backend asked for by name (argument or VTTS_RT_BACKEND) runs or fails with the reason.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from vtts_rt.config import backend_override
from vtts_rt.types import require

logger = logging.getLogger(__name__)


def interpreted() -> bool:
    """Whether Triton kernels run in Triton's interpreter here: slowly, on tensors of the CPU. For
    tests of a machine without a GPU; decided when triton is imported, so for a whole process."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def triton_supports(device: str) -> str | None:
    """`Backend.supports` of Triton kernels: None, or why not."""
    if device != "cuda" and not interpreted():
        return f"tensors are on {device}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install 'vtts_rt[triton]'"
    return None


@dataclass(frozen=True, slots=True)
class Backend:
    """One implementation of an op.

    supports: called with a device type ("cpu", "cuda"), returns None when the backend can run
        tensors of that device here, else a reason that completes "backend 'x' unavailable: ...".
    run: the implementation; its signature is the op's own.
    """

    name: str
    supports: Callable[[str], str | None]
    run: Callable[..., Any]


class Choice(NamedTuple):
    """A row of the table that `vtts-rt env` prints: what runs an op and why."""

    op: str
    backend: str
    reason: str


class Op:
    """The backends of one op, best first. Resolving is cached per (device, wish)."""

    def __init__(
        self,
        name: str,
        backends: tuple[Backend, ...],
        devices: tuple[str, ...],
        by_shape: Callable[[], list[Choice]] = list,
    ) -> None:
        self.name = name
        self.backends = backends
        self.devices = devices
        self.by_shape = by_shape
        self._resolved: dict[tuple[str, str], Backend] = {}

    def resolve(self, device: str, backend: str = "auto") -> Backend:
        """The backend that runs tensors of `device` ("cpu", "cuda").

        backend: "auto" or a backend's name; VTTS_RT_BACKEND stands in for "auto".
        Raises ValueError for an unknown name, RuntimeError (with the reason and what is supported
        here) for one that cannot run.
        """
        wish = (backend_override(self.name) or "auto") if backend == "auto" else backend
        key = (device, wish)
        if key not in self._resolved:
            chosen, reason = self._choose(device, wish)
            logger.info("%s on %s: backend %s (%s)", self.name, device, chosen.name, reason)
            self._resolved[key] = chosen
        return self._resolved[key]

    def explain(self) -> list[Choice]:
        """What would run now, a row for each device there is; "none" where the wish fails."""
        rows = []
        for device in self.devices:
            if device == "cuda" and not torch.cuda.is_available():
                continue
            wish = backend_override(self.name) or "auto"
            try:
                chosen, reason = self._choose(device, wish)
                rows.append(Choice(f"{self.name} on {device}", chosen.name, reason))
            except (RuntimeError, ValueError) as error:
                rows.append(Choice(f"{self.name} on {device}", "none", str(error)))
        return rows + self.by_shape()

    def _choose(self, device: str, wish: str) -> tuple[Backend, str]:
        refusals = {b.name: b.supports(device) for b in self.backends}
        usable = [b for b in self.backends if refusals[b.name] is None]
        if wish != "auto":
            require(self.name, "backend", wish, wish in refusals, f"auto, {', '.join(refusals)}")
            if refusals[wish] is not None:
                here = ", ".join(b.name for b in usable) or "none"
                raise RuntimeError(
                    f"{self.name}: backend {wish!r} unavailable: {refusals[wish]}; "
                    f"supported here: {here}"
                )
            return next(b for b in usable if b.name == wish), "asked for"
        if not usable:
            why = "; ".join(f"{name}: {reason}" for name, reason in refusals.items())
            raise RuntimeError(f"{self.name}: no backend for device {device!r}: {why}")
        passed_over = self.backends[: self.backends.index(usable[0])]
        why = "; ".join(f"no {b.name}: {refusals[b.name]}" for b in passed_over)
        return usable[0], why or "preferred"


_registry: dict[str, Op] = {}


def names() -> list[str]:
    """All registered ops (importing vtts_rt.ops registers them)."""
    return list(_registry)


def backend_names(name: str) -> list[str]:
    """Names of all backends of an op, best first, whether they can run here or not."""
    return [b.name for b in _registry[name].backends]


def backends(name: str, device: str) -> list[str]:
    """Names of the backends of an op that can run tensors of `device` here, best first."""
    return [b.name for b in _registry[name].backends if b.supports(device) is None]


def register(
    name: str,
    *backends: Backend,
    devices: tuple[str, ...] = ("cpu", "cuda"),
    by_shape: Callable[[], list[Choice]] = list,
) -> Op:
    """Make an op known under `name`; backends in order of preference. by_shape: further rows for
    `explain`, about calls that go to another backend because of their shape."""
    op = Op(name, backends, devices, by_shape)
    _registry[name] = op
    return op


def explain() -> list[Choice]:
    """The table of all registered ops (importing vtts_rt.ops registers them)."""
    return [choice for op in _registry.values() for choice in op.explain()]
