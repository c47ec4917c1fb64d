"""WeightHandles: weights of one process that another on the same machine reads where they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import reduce_tensor

# A function that opens a tensor, and its arguments, which can be pickled.
_Handle = tuple[Callable[..., Tensor], tuple[Any, ...]]


class WeightHandles(Mapping[str, Tensor]):
    """Tensors by name. Pickled they become handles, of CUDA memory (CUDA IPC) or of shared memory
    on the CPU, and no byte is copied; what unpickles them has the same memory, under its own name
    of the device. `Runtime.update_weights` takes them.

    The process that exports keeps its own object, and leaves the tensors as they are, until the
    other side has ended its update. A handle is opened at the first access and stays open until
    `close`; later accesses open it again.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors: dict[str, Tensor] = dict(tensors)
        self._handles: dict[str, _Handle] = {}

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._tensors.get(name)
        if tensor is None:
            function, arguments = self._handles[name]
            tensor = self._tensors[name] = function(*arguments)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._handles or self._tensors)

    def __len__(self) -> int:
        return len(self._handles or self._tensors)

    def close(self) -> None:
        """Let go of the tensors of handles: the memory is closed once nothing else holds them. The
        exporter's own tensors stay."""
        if self._handles:
            self._tensors.clear()

    def __getstate__(self) -> dict[str, _Handle]:
        return self._handles or {name: _handle(t) for name, t in self._tensors.items()}

    def __setstate__(self, handles: dict[str, _Handle]) -> None:
        self._tensors, self._handles = {}, handles


def export_weights(model: nn.Module | Mapping[str, Tensor]) -> WeightHandles:
    """Handles of a trainer's weights, for a runtime in another process on the same machine.

    model: of transformers, or tensors by its names (see `Runtime.update_weights`), on CUDA or in
    memory. Those in memory move into shared memory, where the trainer goes on with them.
    """
    tensors = model.state_dict() if isinstance(model, nn.Module) else model
    return WeightHandles({name: tensor.detach() for name, tensor in tensors.items()})


def _handle(tensor: Tensor) -> _Handle:
    if tensor.is_cuda:
        handle: _Handle = reduce_tensor(tensor)  # type: ignore[no-untyped-call]
        return handle
    shared = tensor.untyped_storage()._share_filename_cpu_()
    place = tensor.storage_offset(), tuple(tensor.shape), tensor.stride()
    return _open_shared, (shared, tensor.dtype, *place)


def _open_shared(
    shared: tuple[Any, ...],
    dtype: torch.dtype,
    offset: int,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
) -> Tensor:
    storage = torch.UntypedStorage._new_shared_filename_cpu(*shared)
    return torch.empty(0, dtype=dtype).set_(storage, offset, shape, stride)
