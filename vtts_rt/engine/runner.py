"""Runner: one forward pass of the language model over the chunks of several sequences, and the
choice of their tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from vtts_rt.engine.encoder import Features
from vtts_rt.engine.kv_pool import PagedKVPool
from vtts_rt.engine.sequence import Chunk
from vtts_rt.errors import BadRequest
from vtts_rt.models.attention import Call, PagedKV, plan_calls, tensors_of, upload, with_tensors
from vtts_rt.models.base import ForwardBatch, VideoLM, VisionRows
from vtts_rt.ops.logits import Penalties, penalised
from vtts_rt.ops.sampling import SampleParams, chosen_logprobs, processed_logits, sample
from vtts_rt.sampling import ResolvedSampling

# Logits of about so many rows are made at once: 128 rows of 151,936 float32 are 78 MB.
_ROWS_OF_LOGITS = 128

# Token ids and log-probabilities of a chunk's rows, in order. Each is taken only once those before
# it stand in the sequence.
Choices = Iterator[tuple[int, float]]


class Runner:
    """Feeds a model's language tower from a KV pool. Chunks own pages for all their rows.

    on_device: whether attention is planned for a GPU, which reads shared pages once.
    """

    def __init__(self, model: VideoLM, pool: PagedKVPool, *, on_device: bool) -> None:
        self.model = model
        self._pool = pool
        self._on_device = on_device

    @torch.inference_mode()
    def forward(self, chunks: list[Chunk], features: Features) -> list[Tensor]:
        """Compute the chunks; KV goes to their pages.

        Returns for each chunk the final hidden states (1 + drafts, hidden) that the next tokens
        come from, or (0, hidden) where the chunk does not reach the last known token.
        """
        bounds = np.cumsum([0, *(chunk.num_rows for chunk in chunks)])
        wanted = [1 + len(chunk.drafts) if chunk.samples else 0 for chunk in chunks]
        ids = [i for c in chunks for i in (*c.sequence.token_ids[c.start : c.end], *c.drafts)]
        known = [c.sequence.positions(c.start, c.end, len(c.drafts)) for c in chunks]
        slots = torch.cat([self._slots(chunk) for chunk in chunks])
        ends = zip(bounds[1:].tolist(), wanted, strict=True)
        rows = [row for end, num in ends for row in range(end - num, end)]
        vision_rows, found = self._vision(chunks, features)
        every, whole = self._calls(chunks, np.diff(bounds).tolist()), len(rows) == len(ids)
        last = [] if whole else self._calls(chunks, wanted)
        tensors = [torch.tensor(ids), torch.from_numpy(np.concatenate(known).T), slots]
        tensors += [torch.tensor(own, dtype=torch.int64) for own in (rows, vision_rows)]
        moved = iter(upload([*tensors, *tensors_of(every), *tensors_of(last)], self.model.device))
        token_ids, positions, slots, chosen, shown = islice(moved, 5)
        calls, last = with_tensors(every, moved), with_tensors(last, moved)
        hidden: Tensor = self.model(
            ForwardBatch(
                token_ids,
                VisionRows(shown, torch.cat(found)) if found else None,
                positions,
                bounds.tolist(),
                PagedKV(self._pool.pages, slots, calls, last),
                None if whole else chosen,
            )
        )
        return list(torch.split(hidden, wanted))

    @torch.inference_mode()
    def choices(self, done: list[tuple[Chunk, Tensor]]) -> Iterator[Choices]:
        """Choices of each computed chunk, from its final hidden states (n, hidden). Chunks share
        products, so that the head's matrix is read once for many of them."""
        group: list[tuple[Chunk, Tensor]] = []
        for one in done:
            if group and sum(len(h) for _, h in group) + len(one[1]) > _ROWS_OF_LOGITS:
                yield from self._choices(group)
                group = []
            group.append(one)
        yield from self._choices(group)

    def _choices(self, group: list[tuple[Chunk, Tensor]]) -> Iterator[Choices]:
        sizes = [len(hidden) for _, hidden in group]
        if not sum(sizes):
            return (iter(()) for _ in group)
        logits = self.model.logits(torch.cat([hidden for _, hidden in group]))
        rows_of = torch.split(logits, sizes)
        own = [(chunk, rows) for (chunk, _), rows in zip(group, rows_of, strict=True)]
        free = [one for one in own if not needs_host(one[0])]
        found = iter(self._drawn(free, logits if len(free) == len(own) else None))
        return (
            self._choose_each(chunk, rows)
            if needs_host(chunk)
            else iter(list(islice(found, len(rows))))
            for chunk, rows in own
        )

    @staticmethod
    def _drawn(group: list[tuple[Chunk, Tensor]], whole: Tensor | None) -> list[tuple[int, float]]:
        """Choices of all rows of chunks at once. whole: their logits in one piece, if they are."""
        rows = [(c.sequence, c.drafts[:row]) for c, own in group for row in range(len(own))]
        if not rows:
            return []
        logits = torch.cat([own for _, own in group]) if whole is None else whole
        places = torch.tensor([len(sequence.logprobs) + len(more) for sequence, more in rows])
        sampling = [sequence.sampling for sequence, _ in rows]
        is_raw = torch.tensor([params.logprobs == "raw" for params in sampling])
        chosen = drawn(
            logits,
            Penalties.of([(s.rules, more) for s, more in rows], logits.device),
            sampling,
            members=[sequence.request.member for sequence, _ in rows],
            rounds=[sequence.request.round_index for sequence, _ in rows],
            positions=places.to(logits.device, non_blocking=True),
            is_raw=is_raw.to(logits.device, non_blocking=True) if is_raw.any() else None,
        )
        return as_choices(fetch(packed(*chosen))())

    def _choose_each(self, chunk: Chunk, logits: Tensor) -> Choices:
        """One after the other: masks and forced tokens depend on those before."""
        sequence, request = chunk.sequence, chunk.sequence.request
        sampling, rules, constraint = sequence.sampling, sequence.rules, request.constraint
        for own in logits:
            position = len(sequence.logprobs)
            row = own if rules is None else rules(own, position)
            if request.forced_ids:
                token_id = request.forced_ids[position]
                logprob = float(processed_logits(row, sampling).log_softmax(-1)[token_id])
            else:
                if constraint is not None:
                    row = constraint.mask(row)
                if rules is not None and bool(row.max() == -torch.inf):
                    # A grammar counts alone then, or a clue could not end.
                    if constraint is None:
                        raise BadRequest(
                            "generate: sampling must leave a token to choose, got none after "
                            "no_repeat_ngram_size, bad_words_ids and suppress_tokens"
                        )
                    row = constraint.mask(own)
                found = sample(
                    row[None],
                    [sampling],
                    members=[request.member],
                    rounds=[request.round_index],
                    positions=[position],
                )
                token_id, logprob = int(found[0]), float(found[1])
            if sampling.logprobs == "raw":
                logprob = float(own.float().log_softmax(-1)[token_id])
            yield token_id, logprob

    def _calls(self, chunks: list[Chunk], num_rows: list[int]) -> list[Call]:
        """How the last `num_rows` rows of each chunk attend; tensors on the CPU."""
        return plan_calls(
            [chunk.sequence.pages for chunk in chunks],
            num_rows,
            [chunk.start + chunk.num_rows for chunk in chunks],
            self._pool.page_size,
            on_gpu=self._on_device,
        )

    def _slots(self, chunk: Chunk) -> Tensor:
        size = self._pool.page_size
        index = torch.arange(chunk.start, chunk.start + chunk.num_rows)
        first = chunk.start // size
        pages = torch.tensor(chunk.sequence.pages[first:], dtype=torch.int64)
        return pages[index // size - first] * size + index % size

    @staticmethod
    def _vision(chunks: list[Chunk], features: Features) -> tuple[list[int], list[Tensor]]:
        """Rows that show vision, and the features for them."""
        rows: list[int] = []
        found, first = [], 0
        for chunk in chunks:
            for place in chunk.sequence.pairs_between(chunk.start, chunk.end):
                low, high = max(place.start, chunk.start), min(place.end, chunk.end)
                rows += range(first + low - chunk.start, first + high - chunk.start)
                found.append(features[place.key][low - place.start : high - place.start])
            first += chunk.num_rows
        return rows, found


def needs_host(chunk: Chunk) -> bool:
    """Whether its tokens cannot be drawn before those that stand before them are known."""
    request, rules = chunk.sequence.request, chunk.sequence.rules
    has_runs = rules is not None and rules.needs_host
    return request.constraint is not None or bool(request.forced_ids) or has_runs


def drawn(
    logits: Tensor,
    penalties: Penalties | None,
    params: SampleParams | Sequence[ResolvedSampling],
    *,
    members: Tensor | Sequence[int],
    rounds: Tensor | Sequence[int],
    positions: Tensor,
    is_raw: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`sample` after penalties. is_raw: (N,) bool, whose log-probabilities are the model's own;
    None: no row's."""
    tokens, logprobs = sample(
        logits if penalties is None else penalised(logits, penalties, positions),
        params,
        members=members,
        rounds=rounds,
        positions=positions,
    )
    if is_raw is not None:
        logprobs = torch.where(is_raw, chosen_logprobs(logits, tokens), logprobs)
    return tokens, logprobs


def packed(tokens: Tensor, logprobs: Tensor) -> Tensor:
    """(N,) each -> (2, N) float64, which holds ids exactly: one tensor to copy."""
    return torch.stack((tokens.double(), logprobs.double()))


def fetch(tensor: Tensor) -> Callable[[], Tensor]:
    """Begin to copy a tensor, as it is now, to the host; returns what waits for the copy."""
    if not tensor.is_cuda:
        copy = tensor.clone()
        return lambda: copy
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()

    def wait() -> Tensor:
        event.synchronize()
        return host

    return wait


def as_choices(fetched: Tensor) -> list[tuple[int, float]]:
    """What was packed."""
    tokens, logprobs = fetched.tolist()
    return [(int(token), logprob) for token, logprob in zip(tokens, logprobs, strict=True)]
