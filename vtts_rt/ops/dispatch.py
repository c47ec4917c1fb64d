"""Which implementation of an op runs, and why.

An op registers its backends in order of preference. A backend says with `supports` whether it can
run here, with `refuses` whether it can take a call's tensors, and with `leaves` whether another one
was measured to be faster: None, or the reason why not. `auto` takes the first that can and says so
once in the log. A backend asked for by name runs or fails with the reason; one asked for by
VTTS_RT_BACKEND, which is for all calls of a process, leaves what it refuses to `auto`.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vtts_rt.config import backend_override
from vtts_rt.types import require

logger = logging.getLogger(__name__)

ASKED = "asked for"  # the reason of a backend that was named


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


def triton_refuses(*tensors: object) -> str | None:
    """`Backend.refuses` of Triton kernels that compute in float32; what is no tensor is passed."""
    found = [x for x in tensors if isinstance(x, Tensor)]
    if torch.is_grad_enabled() and any(x.requires_grad for x in found):
        return "a tensor that needs a gradient"
    if any(x.dtype is torch.float64 for x in found):
        return "float64, where arithmetic is in float32"
    return None


def anything(*call: object) -> None:
    """`Backend.supports`, `refuses` and `leaves` of what torch's operators do."""


@dataclass(frozen=True, slots=True)
class Backend:
    """One implementation of an op.

    supports: called with a device type ("cpu", "cuda"), returns None when the backend can run
        tensors of that device here, else a reason that completes "backend 'x' unavailable: ...".
    run: the implementation. refuses, leaves: called with the arguments of `run`; None, or why it
        cannot take them, and why "auto" takes the next one.
    """

    name: str
    supports: Callable[[str], str | None]
    run: Callable[..., Any]
    refuses: Callable[..., str | None] = anything
    leaves: Callable[..., str | None] = anything


class Choice(NamedTuple):
    """A row of the table that `vtts-rt env` prints: what runs an op and why."""

    op: str
    backend: str
    reason: str


class Op:
    """The backends of one op, best first. Called with a device type, the name of a backend or
    "auto", and the arguments of `Backend.run`."""

    def __init__(self, name: str, *backends: Backend) -> None:
        self.name = name
        self.backends = backends
        self._resolved: dict[tuple[str, str], tuple[list[Backend], str]] = {}

    def __call__(self, device: str, backend: str, *call: Any) -> Any:
        return self.choose(device, backend, *call)[0].run(*call)

    def choose(self, device: str, backend: str, *call: Any) -> tuple[Backend, str]:
        """The backend that runs a call, and why. Raises as `resolve`, and ValueError where the one
        that `backend` names cannot take the arguments."""
        usable, reason = self.resolve(device, backend)
        for candidate in usable:
            why = candidate.refuses(*call)
            if why is None and reason != ASKED:
                why = candidate.leaves(*call)
            if why is None:
                return candidate, reason
            rule = f"what backend {backend!r} takes"
            require(self.name, "arguments", why, backend == "auto", rule)
            reason = f"no {candidate.name}: {why}"
        raise RuntimeError(f"{self.name}: no backend on {device} takes the arguments: {reason}")

    def resolve(self, device: str, backend: str = "auto") -> tuple[list[Backend], str]:
        """The backends for tensors of `device` ("cpu", "cuda"), the first one first, and why it is;
        kept for each device and name.

        backend: "auto" or a backend's name; VTTS_RT_BACKEND stands in for "auto".
        Raises ValueError for an unknown name, RuntimeError (with the reason and what is supported
        here) for one that cannot run.
        """
        wanted = (backend_override(self.name) or "auto") if backend == "auto" else backend
        if (device, wanted) in self._resolved:
            return self._resolved[device, wanted]
        refusals = {b.name: b.supports(device) for b in self.backends}
        known = ("auto", *refusals)
        require(self.name, "backend", wanted, wanted in known, ", ".join(known))
        usable = [b for b in self.backends if refusals[b.name] is None]
        refused = [f"{name}: {why}" for name, why in refusals.items() if why is not None]
        if not usable:
            why = "; ".join(refused)
            raise RuntimeError(f"{self.name}: no backend for device {device!r}: {why}")
        if wanted == "auto":
            passed_over = refused[: self.backends.index(usable[0])]
            reason = "; ".join(f"no {why}" for why in passed_over) or "preferred"
        elif refusals[wanted] is None:
            usable.sort(key=lambda b: b.name != wanted)
            reason = ASKED
        else:
            raise RuntimeError(
                f"{self.name}: backend {wanted!r} unavailable: {refusals[wanted]}; "
                f"supported here: {', '.join(b.name for b in usable)}"
            )
        logger.info("%s on %s: backend %s (%s)", self.name, device, usable[0].name, reason)
        self._resolved[device, wanted] = usable, reason
        return usable, reason

    def explain(self, use: str, device: str, *call: Any) -> Choice:
        """What would run a call, or calls that nothing refuses; "none" where none can."""
        try:
            if call:
                chosen, reason = self.choose(device, "auto", *call)
            else:
                (chosen, *_), reason = self.resolve(device)
            return Choice(f"{use} on {device}", chosen.name, reason)
        except (RuntimeError, ValueError) as error:
            return Choice(f"{use} on {device}", "none", str(error))


registry: dict[str, Op] = {}  # filled by importing vtts_rt.ops


def backends(name: str, device: str) -> list[str]:
    """Names of the backends of an op that can run tensors of `device` here, best first."""
    return [b.name for b in registry[name].backends if b.supports(device) is None]


def register(name: str, *backends: Backend) -> Op:
    """Make an op known under `name`; backends in order of preference."""
    return registry.setdefault(name, Op(name, *backends))


def devices() -> tuple[str, ...]:
    """Types of the devices there are."""
    return ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def explain() -> list[Choice]:
    """The table of all registered ops, a row for each device there is."""
    return [op.explain(op.name, device) for op in registry.values() for device in devices()]
