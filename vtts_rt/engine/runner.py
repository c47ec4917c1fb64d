"""Runner: one forward pass of the language model over the chunks of several sequences."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from vtts_rt.engine.encoder import Features
from vtts_rt.engine.kv_pool import PagedKVPool
from vtts_rt.engine.sequence import Chunk
from vtts_rt.models.language import ForwardBatch, PagedKV
from vtts_rt.models.qwen2_5_vl import Qwen2_5_VL

# Logits of about so many rows are made at once: 128 rows of 151,936 float32 are 78 MB.
_ROWS_OF_LOGITS = 128


class Runner:
    """Feeds a model's language tower from a KV pool. Chunks own pages for all their rows."""

    def __init__(self, model: Qwen2_5_VL, pool: PagedKVPool) -> None:
        self.model = model
        self._pool = pool

    @torch.inference_mode()
    def forward(self, chunks: list[Chunk], features: Features) -> list[Tensor]:
        """Compute the chunks; KV goes to their pages.

        Returns for each chunk the final hidden states (1 + drafts, hidden) that the next tokens
        come from, or (0, hidden) where the chunk does not reach the last known token.
        """
        device = self.model.device
        bounds = np.cumsum([0, *(chunk.num_rows for chunk in chunks)])
        wanted = [1 + len(chunk.drafts) if chunk.samples else 0 for chunk in chunks]
        rows = [
            np.arange(stop - count, stop) for stop, count in zip(bounds[1:], wanted, strict=True)
        ]
        positions = [c.sequence.positions(c.start, c.end, len(c.drafts)) for c in chunks]
        batch = ForwardBatch(
            inputs_embeds=self._embed(chunks, features),
            position_ids=torch.from_numpy(np.concatenate(positions).T.copy()).to(device),
            cu_seqlens_q=bounds.tolist(),
            kv=PagedKV(
                pages=self._pool.pages,
                page_table=self._page_table(chunks),
                slot_mapping=torch.cat([self._slots(c) for c in chunks]).to(device),
                seqlens_k=[chunk.start + chunk.num_rows for chunk in chunks],
            ),
            rows=torch.from_numpy(np.concatenate(rows)),
        )
        hidden: Tensor = self.model.language(batch)
        return list(torch.split(hidden, wanted))

    @torch.inference_mode()
    def logits(self, hidden: list[Tensor]) -> Iterator[Tensor]:
        """(n, hidden) of each chunk -> (n, V). Chunks share products, so that the head's matrix
        is read once for many of them."""
        group: list[Tensor] = []
        for rows in hidden:
            if group and sum(map(len, group)) + len(rows) > _ROWS_OF_LOGITS:
                yield from self._logits(group)
                group = []
            group.append(rows)
        yield from self._logits(group)

    def _logits(self, group: list[Tensor]) -> tuple[Tensor, ...]:
        logits = self.model.language.logits(torch.cat(group))
        return torch.split(logits, [len(rows) for rows in group])

    def _page_table(self, chunks: list[Chunk]) -> Tensor:
        """(B, most pages) int64; rows are filled up with page 0, which nobody reads there."""
        table = np.zeros((len(chunks), max(len(c.sequence.pages) for c in chunks)), np.int64)
        for row, chunk in zip(table, chunks, strict=True):
            row[: len(chunk.sequence.pages)] = chunk.sequence.pages
        return torch.from_numpy(table)

    def _slots(self, chunk: Chunk) -> Tensor:
        size = self._pool.page_size
        index = torch.arange(chunk.start, chunk.start + chunk.num_rows)
        first = chunk.start // size
        pages = torch.tensor(chunk.sequence.pages[first:], dtype=torch.int64)
        return pages[index // size - first] * size + index % size

    def _embed(self, chunks: list[Chunk], features: Features) -> Tensor:
        ids = [i for c in chunks for i in (*c.sequence.token_ids[c.start : c.end], *c.drafts)]
        embeds = self.model.language.embed(torch.tensor(ids, device=self.model.device))
        row = 0
        for chunk in chunks:
            for place in chunk.sequence.pairs_between(chunk.start, chunk.end):
                low, high = max(place.start, chunk.start), min(place.end, chunk.end)
                found = features[place.key][low - place.start : high - place.start]
                embeds[row + low - chunk.start : row + high - chunk.start] = found
            row += chunk.num_rows
        return embeds
