"""DecodeStep: one decoding step of a batch, from buffers that it moves on to the next.

It runs from the embedding to the choice of tokens without asking the host anything, on memory that
stays where it is, so it can be captured as a CUDA graph. The tokens that it chooses are the input
of the next step, which can be launched before the host has seen them.

Rows of padding have no keys: nothing of theirs is written to a page.
"""

from __future__ import annotations

from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vtts_rt.engine.kv_pool import PagedKVPool
from vtts_rt.engine.runner import drawn, packed
from vtts_rt.models.attention import Attend, Call, Cascade, PagedKV
from vtts_rt.models.base import ForwardBatch, VideoLM
from vtts_rt.ops.cascade_attention import Groups
from vtts_rt.ops.logits import Penalties
from vtts_rt.ops.sampling import SampleParams

# One int64 a row of a step each. keys: behind the shared ones, with the new token's; 0 in rows of
# padding. position: on all axes of M-RoPE. choice: index of the token to be chosen
# among those generated, for the noise. num_seen, num_history: as ops.logits.Penalties. raw: whether
# log-probabilities are the model's own. temperature to frequency: the bits of a float64.
FIELDS = (
    *("token", "keys", "position", "choice", "member", "round"),
    *("seed", "top_k", "num_seen", "num_history", "raw"),
    *("temperature", "top_p", "repetition", "presence", "frequency"),
)
# Narrower tables would save nothing (1,024 tokens in pages of 16).
_LEAST_PAGES = 64
_LEAST_HISTORY = 1024


class Shape(NamedTuple):
    """What a step computes, or at most. num_rows: rows; num_pages: pages of a row, less those that
    it shares; num_groups, num_shared: groups of rows (0: no cascade) and pages that a group shares.
    has_filters: whether any row has a top-k or top-p, for which logits are sorted. num_history,
    num_biased: tokens that a row's penalties remember, and that are biased (0: none in any row).
    has_raw: whether any row's log-probabilities are the model's own."""

    num_rows: int
    num_pages: int
    num_groups: int
    num_shared: int
    has_filters: bool = False
    num_history: int = 0
    num_biased: int = 0
    has_raw: bool = False

    def rounded(self) -> Shape:
        """The shape of the graph for such a step: rows 1, 2, 4, 8, then multiples of 8, all else
        powers of two. (Attention to what is shared is split among the more programs the fewer
        groups there may be.) History has a place for the token that the step adds."""
        rows, groups, history = self.num_rows, self.num_groups, self.num_history
        return self._replace(
            num_rows=_power(rows) if rows <= 8 else -(-rows // 8) * 8,
            num_pages=_power(self.num_pages, _LEAST_PAGES),
            num_groups=_power(groups) if groups else 0,
            num_shared=_power(self.num_shared, _LEAST_PAGES) if groups else 0,
            num_history=_power(history + 1, _LEAST_HISTORY) if history else 0,
            num_biased=_power(self.num_biased) if self.num_biased else 0,
        )


def _power(number: int, least: int = 1) -> int:
    return max(least, 1 << (number - 1).bit_length())


class Buffers:
    """What a step starts from and moves on, in one piece: `whole`, int64, of which the others are
    views, so that one copy writes them all. At first without a real row.

    state: (fields, rows), as `FIELDS` names them. table: (rows, pages), those behind the shared
    ones. shared_table: (groups, shared pages); shared_keys: (groups,); groups: (groups + 1,): what
    `cascade_attention` takes; groups too many are without rows. history: (rows, tokens), biased,
    bias (bits of a float64), until: (rows, biased): as ops.logits.Penalties.
    """

    def __init__(self, shape: Shape, device: torch.device, *, pinned: bool = False) -> None:
        rows = shape.num_rows
        shapes = [
            (len(FIELDS), rows + rows % 2),
            (rows, shape.num_pages),
            (shape.num_groups, shape.num_shared),
            (shape.num_groups,),
            (shape.num_groups + 1,),
            (rows, shape.num_history),
            *((rows, shape.num_biased),) * 3,
        ]
        # All begin at multiples of 16 bytes, for which Triton compiles one kernel.
        sizes = [-(-prod(each) // 2) * 2 for each in shapes]
        self.whole = torch.zeros(sum(sizes), dtype=torch.int64, device=device, pin_memory=pinned)
        parts = [
            part[: prod(each)].view(each)
            for part, each in zip(torch.split(self.whole, sizes), shapes, strict=True)
        ]
        state, self.table, self.shared_table, self.shared_keys, self.groups = parts[:5]
        self.history, self.biased, self.bias, self.until = parts[5:]
        self.state = state[:, :rows]
        for name in ("top_p", "repetition"):
            self.state[FIELDS.index(name)] = torch.ones((), dtype=torch.float64).view(torch.int64)

    def fill(
        self,
        penalties: Penalties | None,
        params: SampleParams,
        groups: Groups | None,
        **columns: Any,
    ) -> None:
        """Write the first rows, on the CPU: all but the table. columns: by the names of FIELDS."""
        columns |= {"seed": params.seed, "top_k": params.top_k}
        columns |= {"temperature": params.temperature.double(), "top_p": params.top_p}
        if penalties is not None:
            history, biased, bias, until = penalties[5:]
            self.history[: len(history), : history.shape[1]] = history
            places = slice(len(biased)), slice(biased.shape[1])
            self.biased[places], self.until[places] = biased, until
            self.bias[places] = bias.double().view(torch.int64)
            columns |= {"num_seen": penalties.num_seen, "num_history": penalties.num_history}
            for name in ("repetition", "presence", "frequency"):
                columns[name] = getattr(penalties, name).double()
        for name, column in columns.items():
            values = torch.as_tensor(column)
            if values.is_floating_point():
                values = values.contiguous().view(torch.int64)
            self.state[FIELDS.index(name), : len(values)] = values
        if groups is not None:
            num_groups, width = groups.shared_table.shape
            self.shared_table[:num_groups, :width] = groups.shared_table
            self.shared_keys[:num_groups] = groups.shared_seqlens
            self.groups[:] = len(values)
            self.groups[: num_groups + 1] = groups.cu_groups


class DecodeStep:
    """The step of one shape and its buffers."""

    def __init__(self, model: VideoLM, pool: PagedKVPool, shape: Shape) -> None:
        self.shape = shape
        self._model, self._pool = model, pool
        device = pool.pages.device
        self._bounds = torch.arange(shape.num_rows + 1, device=device)
        self.buffers = Buffers(shape, device)

    def __call__(self) -> Tensor:
        """Compute the step; returns (2, rows) float64 tokens and log-probabilities, `packed`."""
        state = dict(zip(FIELDS, self.buffers.state, strict=True))
        token, keys, page_size = state["token"], state["keys"], self._pool.page_size
        is_real = keys > 0
        last = (keys - 1).clamp(min=0)
        pages = self.buffers.table.gather(1, (last // page_size)[:, None])[:, 0]
        slots = torch.where(is_real, pages * page_size + last % page_size, -1)
        hidden: Tensor = self._model(
            ForwardBatch(
                token_ids=token,
                vision=None,
                position_ids=state["position"].expand(3, -1),
                cu_seqlens_q=range(self.shape.num_rows + 1),
                kv=PagedKV(self._pool.pages, slots, [self._attend(keys.clamp(min=1))]),
            )
        )
        tokens, logprobs = drawn(
            self._model.logits(hidden),
            self._penalties(state),
            SampleParams(
                state["temperature"].view(torch.float64).float(),
                state["top_k"],
                state["top_p"].view(torch.float64),
                state["seed"],
                self.shape.has_filters,
            ),
            members=state["member"],
            rounds=state["round"],
            positions=state["choice"],
            is_raw=state["raw"] > 0 if self.shape.has_raw else None,
        )
        # What a row of padding chose, perhaps from NaN, is no token to embed.
        token.copy_(torch.where(is_real, tokens, 0))
        if self.shape.num_history:
            end = state["num_history"].clamp(max=self.shape.num_history - 1)
            self.buffers.history.scatter_(1, end[:, None], token[:, None])
        for name in ("keys", "position", "choice", "num_history"):
            state[name].add_(is_real)
        return packed(tokens, logprobs)

    def _penalties(self, state: dict[str, Tensor]) -> Penalties | None:
        """Those of rows without any change nothing; a step without any pays nothing for them."""
        if not self.shape.num_history and not self.shape.num_biased:
            return None
        buffers = self.buffers
        return Penalties(
            state["repetition"].view(torch.float64).float(),
            state["presence"].view(torch.float64).float(),
            state["frequency"].view(torch.float64).float(),
            state["num_seen"],
            state["num_history"],
            buffers.history,
            buffers.biased,
            buffers.bias.view(torch.float64).float(),
            buffers.until,
        )

    def _attend(self, num_keys: Tensor) -> Call:
        rows, table, page_size = self.shape.num_rows, self.buffers.table, self._pool.page_size
        most = self.shape.num_pages * page_size
        if not self.shape.num_groups:
            return Attend(0, rows, table, self._bounds, num_keys, 1, most)
        return Cascade(
            0,
            rows,
            self.buffers.shared_table,
            self.buffers.shared_keys,
            self.buffers.groups,
            table,
            num_keys,
            self.shape.num_shared * page_size,
            most,
        )
