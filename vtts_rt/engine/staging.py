"""StagedWeights: the buckets of one update of the weights, kept in host memory until the last."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

from torch import Tensor

from vtts_rt import process
from vtts_rt.models.base import VideoLM


class StagedWeights:
    """Tensors that wait for the end of an update. Thread-safe: one bucket at a time."""

    def __init__(self, model: VideoLM) -> None:
        self._model = model
        self._tensors: dict[str, Tensor] = {}
        self._lock = threading.Lock()

    def take(
        self,
        tensors: Mapping[str, Tensor],
        apply: Callable[[dict[str, Tensor]], None] | None = None,
    ) -> None:
        """Keep a copy of one more bucket, in the model's dtype; or, with the last one, hand all to
        `apply` and forget them once that has returned. Of a tensor given twice the last counts.

        ValueError for a bucket that does not fit (see `VideoLM.check`); whatever is raised, the
        buckets before stay, and of this one nothing.
        """
        with self._lock:
            with process.native_calls():
                found = self._model.check(tensors)
            if apply is not None:
                apply({**self._tensors, **found})
                self._tensors.clear()
                return
            dtype = self._model.dtype
            with process.native_calls():
                self._tensors |= {
                    name: tensor.detach().to("cpu", dtype, copy=True)
                    for name, tensor in found.items()
                }

    def discard(self) -> None:
        """Forget what was kept."""
        with self._lock:
            self._tensors.clear()

    def stats(self) -> dict[str, int]:
        """tensors kept, and their bytes."""
        kept = list(self._tensors.values())
        return {"tensors": len(kept), "bytes": sum(tensor.nbytes for tensor in kept)}
