"""Layers that the vision tower and the language model share.

Shape letters: N rows, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from vtts_rt.ops.linear import linear, packs
from vtts_rt.ops.packed import Matrix, pack
from vtts_rt.ops.rmsnorm import rmsnorm
from vtts_rt.ops.swiglu import swiglu


class Packable(nn.Module):
    """A module whose `weight` (O, C) may be packed, and has 4 dimensions then (`ops.packed`).

    Packed it gives the same bits in less time. It follows `to` and the like, and its state dict is
    that of the plain one.
    """

    weight: Tensor

    @property
    def matrix(self) -> Matrix:
        """The weight as products take it."""
        raise NotImplementedError

    def pack(self) -> None:
        """Pack the weight where that serves, in the place of the plain one. A gradient is dropped;
        what an optimizer keeps of the plain one does not fit."""
        if packs(self.matrix):
            self.weight.data = pack(self.weight)
            self.weight.grad = None

    def unpack(self) -> None:
        self.weight.data = self.matrix.plain().detach()
        self.weight.grad = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        before = self.weight.dtype, self.weight.device
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.matrix.packed and before != (self.weight.dtype, self.weight.device):
            self.unpack()
            self.pack()
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.matrix.packed:
            destination[f"{prefix}weight"] = self.matrix.plain().detach()

    def _load_from_state_dict(self, *args: Any) -> None:
        packed = self.matrix.packed
        self.unpack()
        super()._load_from_state_dict(*args)
        if packed:
            self.pack()


def plain_tensors(module: nn.Module, device: str | None = None) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by name, packed ones as copies (O, C), one after the other.

    device: None gives those that are not packed as they are, in the same memory; "meta" gives
    shapes and dtypes alone.
    """
    for prefix, owner in module.named_modules():
        own = owner.named_parameters(prefix, recurse=False), owner.named_buffers(prefix, False)
        for name, tensor in chain(*own):
            held = tensor.detach().to(device) if device else tensor.detach()
            if isinstance(owner, Packable) and tensor is owner.weight:
                held = owner.matrix._replace(tensor=held).plain()
            yield name, held


class Linear(Packable, nn.Linear):
    """`nn.Linear` on our op: (..., C) -> (..., O)."""

    @property
    def matrix(self) -> Matrix:
        return Matrix(self.weight, self.out_features)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.matrix, self.bias)


class Embedding(Packable, nn.Embedding):
    """`nn.Embedding` that may serve as a head: (N,) int64 -> (N, C)."""

    @property
    def matrix(self) -> Matrix:
        return Matrix(self.weight, self.num_embeddings)

    def forward(self, ids: Tensor) -> Tensor:
        return self.matrix.rows(ids) if self.matrix.packed else super().forward(ids)


class RMSNorm(nn.Module):
    """x / rms(x) * weight, the mean square in fp32.

    Rounds to the input dtype *before* the weight is applied, as transformers does; the fused
    `F.rms_norm` rounds after it and differs in bf16.
    """

    def __init__(self, num_channels: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rmsnorm(x, self.weight, eps=self.eps)[0]

    def of_sum(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of x + residual, and that sum: in one sweep where the op can."""
        return rmsnorm(x, self.weight, eps=self.eps, residual=residual)


class LayerNorm(nn.LayerNorm):
    """Mean 0 and variance 1, then weight and bias."""

    def __init__(self, num_channels: int, eps: float) -> None:
        super().__init__(num_channels, eps)

    def of_sum(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """As `RMSNorm.of_sum`."""
        x = x + residual
        return self(x), x


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), gate and up as one matrix: rows [gate; up].

    One matrix decodes faster (512 -> 2 x 1408, one row, fp32 CPU: 0.23 against 0.40 ms; qkv
    0.041 against 0.058 ms) and is within 10 % on a thousand rows.
    """

    def __init__(self, num_channels: int, num_hidden: int, bias: bool) -> None:
        super().__init__()
        self.gate_up_proj = Linear(num_channels, 2 * num_hidden, bias=bias)
        self.down_proj = Linear(num_hidden, num_channels, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_up_proj(x)))  # type: ignore[no-any-return]


def inverse_frequencies(dim: int, theta: float) -> Tensor:
    """(dim / 2,) fp32 rotary frequencies theta^(-2i/dim), in the order of ops of transformers."""
    return 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float) / dim))
