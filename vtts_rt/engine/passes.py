"""Passes: how the chunks of one engine step are computed and their tokens chosen.

Either by the runner, in one forward pass, or as a CUDA graph where every chunk is one token to
decode. Behind such a graph the next is launched at once where that is likely to be of use, and its
tokens are on their way while the engine looks at those before: a run ahead.

A run ahead decides nothing. The scheduler plans every step as if there were none, and what one has
computed is taken for a chunk that is just the same, or not at all. So outputs, caches and counters
are those of an engine that never runs ahead. It may write KV of a token that is not used behind
the end of a sequence, or into a free page: later writes there come after it on the same stream.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from vtts_rt.config import EngineConfig
from vtts_rt.engine.encoder import Features
from vtts_rt.engine.graphs import (
    Capture,
    CaptureFailed,
    CudaCapture,
    DecodeGraphs,
    Launched,
)
from vtts_rt.engine.kv_pool import PagedKVPool
from vtts_rt.engine.runner import Choices, Runner, needs_host
from vtts_rt.engine.sequence import Chunk
from vtts_rt.models.base import VideoLM
from vtts_rt.ops.dispatch import interpreted

logger = logging.getLogger(__name__)


class Passes:
    """Computes chunks over one model and pool.

    on_device: see Runner. capture: how graphs are made; None for none, because of `refusal`.
    runs_ahead: False launches nothing before it is asked for (tests compare).
    """

    def __init__(
        self,
        model: VideoLM,
        pool: PagedKVPool,
        *,
        on_device: bool,
        capture: Capture | None,
        refusal: str = "",
    ) -> None:
        self.runs_ahead = True
        self._runner = Runner(model, pool, on_device=on_device)
        self._graphs = None if capture is None else DecodeGraphs(model, pool, capture)
        self._refusal = refusal
        self._ahead: Launched | None = None
        self._num_ahead = self._num_wasted = 0
        self._eager: Counter[str] = Counter()

    @classmethod
    def of_config(cls, model: VideoLM, pool: PagedKVPool, config: EngineConfig) -> Passes:
        """RuntimeError if graphs are asked for where there are none."""
        device = model.device.type
        refusal = None if device == "cuda" else f"the model runs on {device}"
        if config.cuda_graphs is False:
            refusal = "EngineConfig.cuda_graphs is False"
        elif config.cuda_graphs and refusal is not None:
            raise RuntimeError(
                f"Engine: cuda_graphs=True needs a model on CUDA: {refusal}; load it with "
                f"device='cuda' or leave cuda_graphs at None"
            )
        return cls(
            model,
            pool,
            on_device=device == "cuda" or interpreted(),
            capture=CudaCapture() if refusal is None else None,
            refusal=refusal or "",
        )

    def run(
        self, chunks: list[Chunk], features: Features
    ) -> Iterator[tuple[Chunk, Choices | Exception]]:
        """Every chunk with the choices of its tokens, or with what went wrong. Choices are made as
        they are taken."""
        launched = self._launch(chunks) if chunks else None
        rest = [chunk for chunk in chunks if launched is None or not launched.has(chunk)]
        if rest:
            self._eager[self._obstacle(rest) or "beside a step ahead"] += 1
        computed = self._with_choices(self._forward(rest, features))
        for chunk in chunks:
            if launched is not None and launched.has(chunk):
                yield chunk, _one(launched, chunk)
            else:
                yield next(computed)

    def stats(self) -> dict[str, Any]:
        """graphs: "on", or why there are none. graphs_captured, graph_replays; of these
        steps_ahead, and wasted_rows, computed for nothing. eager_steps: by reason."""
        graphs = self._graphs
        return {
            "graphs": self._refusal or "on",
            "graphs_captured": 0 if graphs is None else graphs.captured,
            "graph_replays": 0 if graphs is None else graphs.replays,
            "steps_ahead": self._num_ahead,
            "wasted_rows": self._num_wasted,
            "eager_steps": dict(self._eager),
        }

    def weights_changed(self) -> None:
        """To be called after weights were written, in place or not."""
        self._ahead = None
        if self._graphs is not None:
            self._graphs.forget_moved()

    # -- graphs -----------------------------------------------------------------------------

    def _launch(self, chunks: list[Chunk]) -> Launched | None:
        """The graph that computes the chunks, or was launched ahead and computes some of them;
        None where none does. Here it is decided whether the next step runs ahead."""
        launched = self._taken_ahead(chunks)
        if launched is None and self._obstacle(chunks) is None:
            launched = self._start(chunks)
        if launched is None or self._graphs is None or not self.runs_ahead:
            return launched
        whole = len(launched.rows) == len(chunks) and all(map(launched.has, chunks))
        if whole and all(map(_goes_on, chunks)):
            self._ahead = self._graphs.launch_next(launched)
            self._num_ahead += self._ahead is not None
        return launched

    def _taken_ahead(self, chunks: list[Chunk]) -> Launched | None:
        """What was launched ahead, if any of its rows is wanted."""
        launched, self._ahead = self._ahead, None
        if launched is None:
            return None
        for row in launched.rows:
            row.sequence.page_ahead = None
        wanted = sum(map(launched.has, chunks))
        self._num_wasted += len(launched.rows) - wanted
        return launched if wanted else None

    def _obstacle(self, chunks: list[Chunk]) -> str | None:
        """Why chunks cannot be one graph, or None."""
        if self._graphs is None:
            return self._refusal
        if any(chunk.drafts for chunk in chunks):
            return "drafts"
        if any(chunk.num_rows > 1 or not chunk.samples for chunk in chunks):
            return "prefill"
        if any(map(needs_host, chunks)):
            return "masked or forced tokens"
        if any(c.sequence.pairs_between(c.start, c.end) for c in chunks):
            return "vision tokens"
        return None

    def _start(self, chunks: list[Chunk]) -> Launched | None:
        assert self._graphs is not None
        try:
            return self._graphs.launch(chunks)
        except CaptureFailed as error:
            logger.warning("decoding goes on without CUDA graphs: %s", error)
            self._graphs, self._refusal = None, f"a capture failed: {error}"
            return None

    # -- forward passes ---------------------------------------------------------------------

    def _forward(
        self, chunks: list[Chunk], features: Features
    ) -> list[tuple[Chunk, Tensor | Exception]]:
        """Every chunk with the hidden states of its last rows. A pass that fails is repeated for
        each sequence alone (nothing was noted yet), to find the one that fails."""
        if not chunks:
            return []
        try:
            return list(zip(chunks, self._runner.forward(chunks, features), strict=True))
        except Exception as error:
            if len(chunks) == 1:
                return [(chunks[0], error)]
        return [done for chunk in chunks for done in self._forward([chunk], features)]

    def _with_choices(
        self, done: list[tuple[Chunk, Tensor | Exception]]
    ) -> Iterator[tuple[Chunk, Choices | Exception]]:
        """Choices instead of hidden states. A product that fails is repeated for each chunk
        alone."""
        together = self._runner.choices([(c, h) for c, h in done if isinstance(h, Tensor)])
        for chunk, hidden in done:
            chosen: Choices | Exception
            if isinstance(hidden, Exception):
                chosen = hidden
            else:
                try:
                    chosen = next(together)
                except Exception:  # StopIteration for those that come after the failure
                    try:
                        chosen = next(self._runner.choices([(chunk, hidden)]))
                    except Exception as error:
                        chosen = error
            yield chunk, chosen


def _goes_on(chunk: Chunk) -> bool:
    """Whether its sequence will want a token after the next, and likely just one."""
    sequence = chunk.sequence
    return len(sequence.logprobs) + 1 < sequence.num_new and sequence.drafter.draft_unlikely


def _one(launched: Launched, chunk: Chunk) -> Choices:
    yield launched.choice(chunk)
