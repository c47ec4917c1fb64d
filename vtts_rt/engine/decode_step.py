"""DecodeStep: one decoding step of a batch, from buffers that it moves on to the next.

It runs from the embedding to the choice of tokens without asking the host anything, on memory that
stays where it is, so it can be captured as a CUDA graph. The tokens that it chooses are the input
of the next step: that can be launched before anybody has seen them.

Rows of padding have no keys: nothing of theirs is written to a page.
"""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from vtts_rt.engine.kv_pool import PagedKVPool
from vtts_rt.engine.runner import packed
from vtts_rt.models.attention import Attend, Call, Cascade, PagedKV
from vtts_rt.models.base import ForwardBatch, VideoLM
from vtts_rt.ops.logits import Penalties, penalised
from vtts_rt.ops.sampling import SampleParams, chosen_logprobs, sample

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
    """What a graph is captured for: rows; pages of a row, less those that it shares; groups of rows
    (0: no cascade) and pages that a group shares; all rounded up. Whether any row has a top-k
    or top-p, for which logits are sorted. Tokens that a row's penalties remember, and tokens biased
    (0: none in any row), rounded up. Whether any row wants log-probabilities of the model's own."""

    num_rows: int
    num_pages: int
    num_groups: int
    num_shared: int
    has_filters: bool = False
    num_history: int = 0
    num_biased: int = 0
    has_raw: bool = False


def round_rows(num_rows: int) -> int:
    """Rows of the graph for a step: 1, 2, 4, 8, then multiples of 8."""
    return 1 << (num_rows - 1).bit_length() if num_rows <= 8 else -(-num_rows // 8) * 8


def round_groups(num_groups: int) -> int:
    """Groups of the graph for a step: powers of two. Attention to what is shared is split among the
    more programs the fewer groups there may be."""
    return 1 << (num_groups - 1).bit_length()


def round_pages(num_pages: int) -> int:
    """Width of a page table of the graph for a step: powers of two."""
    return max(_LEAST_PAGES, 1 << (num_pages - 1).bit_length())


def round_history(num_tokens: int) -> int:
    """Tokens that penalties remember in the graph for a step, which adds one: powers of two."""
    return max(_LEAST_HISTORY, 1 << num_tokens.bit_length()) if num_tokens else 0


def round_biased(num_biased: int) -> int:
    """Biased tokens of a row of the graph for a step: powers of two."""
    return 1 << (num_biased - 1).bit_length() if num_biased else 0


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
        logits = self._model.logits(hidden)
        tokens, logprobs = sample(
            self._penalised(logits, state),
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
        )
        if self.shape.has_raw:
            own = chosen_logprobs(logits, tokens)
            logprobs = torch.where(state["raw"] > 0, own, logprobs)
        # What a row of padding chose, perhaps from NaN, is no token to embed.
        token.copy_(torch.where(is_real, tokens, 0))
        if self.shape.num_history:
            end = state["num_history"].clamp(max=self.shape.num_history - 1)
            self.buffers.history.scatter_(1, end[:, None], token[:, None])
        for name in ("keys", "position", "choice", "num_history"):
            state[name].add_(is_real)
        return packed(tokens, logprobs)

    def _penalised(self, logits: Tensor, state: dict[str, Tensor]) -> Tensor:
        """Rows without penalties keep their logits; a step without any pays nothing for them."""
        if not self.shape.num_history and not self.shape.num_biased:
            return logits
        buffers = self.buffers
        penalties = Penalties(
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
        return penalised(logits, penalties, state["choice"])

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
