"""DecodeGraphs: decoding steps as CUDA graphs, one launch instead of hundreds.

A graph is captured for a shape, rounded up, when a step first needs it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from vtts_rt.engine.decode_step import Buffers, DecodeStep, Shape
from vtts_rt.engine.kv_pool import PagedKVPool
from vtts_rt.engine.runner import as_choices, fetch
from vtts_rt.engine.sequence import Chunk, Sequence
from vtts_rt.models.attention import upload
from vtts_rt.models.base import VideoLM
from vtts_rt.ops.cascade_attention import find_groups
from vtts_rt.ops.logits import Penalties
from vtts_rt.ops.sampling import SampleParams

logger = logging.getLogger(__name__)

Step = Callable[[], Tensor]

MOST_GRAPHS = 64  # the least recently used goes; each takes some MB beside the shared pool


class CaptureFailed(RuntimeError):
    """A step cannot be captured; nothing of it was computed."""


# Runs a function at least once and returns what repeats its work, without its Python, on the same
# memory, and overwrites, and returns, the same output. The caller keeps the memory alive.
Capture = Callable[[Step], Step]


class CudaCapture:
    """Captures CUDA graphs that share one pool of memory, for they never run at the same time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Step) -> Step:
        # Libraries initialise and Triton compiles in a first run: outside the capture.
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            function()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # "thread_local": threads that decode frames may allocate meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            output = function()

        def replay() -> Tensor:
            graph.replay()
            return output

        return replay


@dataclass(frozen=True, slots=True)
class _Graph:
    """A captured step, and the step itself, whose tensors it reads."""

    step: DecodeStep
    replay: Step


@dataclass(frozen=True, slots=True)
class _Row:
    """A token in a launched step: number `start` of a sequence, its KV in `page`, which is, or will
    be, pages[index]. num_shared: how many of the pages are its group's. num_history: tokens that
    the penalties of the row remember."""

    sequence: Sequence
    start: int
    pages: list[int]
    index: int
    page: int
    num_shared: int
    num_history: int


class Launched:
    """A step that runs, or has run."""

    def __init__(self, graph: _Graph, rows: list[_Row], wait: Callable[[], Tensor]) -> None:
        self.graph = graph
        self.rows = rows
        self._place = {row.sequence.request_id: place for place, row in enumerate(rows)}
        self._wait = wait
        self._fetched: list[tuple[int, float]] | None = None

    def has(self, chunk: Chunk) -> bool:
        """Whether it computes just this: the same token, its KV in the page that is now the
        sequence's, after the same KV."""
        place = self._place.get(chunk.sequence.request_id)
        if place is None or chunk.num_rows != 1 or not chunk.samples:
            return False
        row, sequence = self.rows[place], chunk.sequence
        same = (row.sequence, row.start) == (sequence, chunk.start) and row.pages is sequence.pages
        return same and row.page == row.pages[row.index]

    def choice(self, chunk: Chunk) -> tuple[int, float]:
        """Token and log-probability of a chunk that it has; waits until they are there."""
        if self._fetched is None:
            self._fetched = as_choices(self._wait())
        return self._fetched[self._place[chunk.sequence.request_id]]


class DecodeGraphs:
    """The graphs of one model and pool, captured as they are wanted.

    captured, replays: graphs captured, steps launched.
    """

    def __init__(self, model: VideoLM, pool: PagedKVPool, capture: Capture) -> None:
        self._model = model
        self._pool = pool
        self._capture = capture
        self._graphs: dict[Shape, _Graph] = {}
        self._weights = self._addresses()
        self.captured = self.replays = 0

    @torch.inference_mode()
    def launch(self, chunks: list[Chunk]) -> Launched:
        """Start a step of chunks of one row each, whose token is text and known. CaptureFailed
        where there is no graph for it and can be none."""
        chunks = sorted(chunks, key=lambda chunk: chunk.sequence.pages)  # sharers side by side
        tables = [chunk.sequence.pages for chunk in chunks]
        sampling = [chunk.sequence.sampling for chunk in chunks]
        params = SampleParams.of(sampling, torch.device("cpu"))
        penalties = Penalties.of([(c.sequence.rules, ()) for c in chunks], torch.device("cpu"))
        num_keys, num_shared = np.array([chunk.end for chunk in chunks]), [0] * len(chunks)
        groups = find_groups(tables, num_keys.tolist(), self._pool.page_size)
        if groups is not None:
            shared = groups.shared_seqlens.repeat_interleave(groups.cu_groups.diff()).numpy()
            num_keys, num_shared = num_keys - shared, (shared // self._pool.page_size).tolist()
        most = max(len(pages) - num for pages, num in zip(tables, num_shared, strict=True))
        num_groups, width = (0, 0) if groups is None else groups.shared_table.shape
        shape = Shape(
            len(chunks),
            most,
            num_groups,
            width,
            params.has_filters,
            0 if penalties is None else penalties.history.shape[1],
            0 if penalties is None else penalties.biased.shape[1],
            any(own.logprobs == "raw" for own in sampling),
        ).rounded()
        graph = self._graph(shape)
        target = graph.step.buffers.whole
        buffers = Buffers(shape, torch.device("cpu"), pinned=target.is_cuda)
        buffers.fill(
            penalties,
            params,
            groups,
            token=[chunk.sequence.token_ids[chunk.start] for chunk in chunks],
            keys=num_keys,
            position=[chunk.sequence.keys[chunk.start, 1] for chunk in chunks],
            choice=[len(chunk.sequence.logprobs) for chunk in chunks],
            member=[chunk.sequence.request.member for chunk in chunks],
            round=[chunk.sequence.request.round_index for chunk in chunks],
            raw=[own.logprobs == "raw" for own in sampling],
        )
        rows = []
        for place, (chunk, num) in enumerate(zip(chunks, num_shared, strict=True)):
            pages, index = chunk.sequence.pages, chunk.start // self._pool.page_size
            buffers.table[place, : len(pages) - num] = torch.tensor(pages[num:])
            remembered = 0 if penalties is None else int(penalties.num_history[place])
            page = pages[index]
            rows.append(_Row(chunk.sequence, chunk.start, pages, index, page, num, remembered))
        target.copy_(buffers.whole, non_blocking=True)
        return self._replay(graph, rows)

    @torch.inference_mode()
    def launch_next(self, launched: Launched) -> Launched | None:
        """Start the step after one that is the graph's last, all of whose rows still stand, from
        the tokens that it chooses. None where no page is free for one of them, or no place in the
        history of its penalties.

        Such a page stays free: its next owner writes to it after this step. `page_ahead` of the
        sequence says which to allocate.
        """
        graph, step = launched.graph, launched.graph.step
        rows: list[_Row] = []
        news: list[tuple[int, int, int]] = []  # row and column of the table, page
        for place, row in enumerate(launched.rows):
            start, index = row.start + 1, (row.start + 1) // self._pool.page_size
            page = row.pages[index] if index < len(row.pages) else None
            if page is None:
                page = self._pool.peek(row.pages[-1], [new for _, _, new in news])
                column = index - row.num_shared
                if page is None or column == step.shape.num_pages:
                    return None
                news.append((place, column, page))
            num_history = row.num_history + bool(row.num_history)
            if num_history > step.shape.num_history:
                return None
            rows.append(replace(row, start=start, index=index, page=page, num_history=num_history))
        if news:
            places, columns, pages = upload(list(torch.tensor(news).T), step.buffers.table.device)
            step.buffers.table.index_put_((places, columns), pages)
        for place, _, page in news:
            rows[place].sequence.page_ahead = page
        return self._replay(graph, rows)

    def forget_moved(self) -> None:
        """Drop the graphs if weights lie elsewhere now: they read them where they were."""
        if self._weights != self._addresses():
            self._graphs.clear()
            self._weights = self._addresses()

    def _addresses(self) -> list[int]:
        return [parameter.data_ptr() for parameter in self._model.parameters()]

    def _graph(self, shape: Shape) -> _Graph:
        graph = self._graphs.pop(shape, None)
        if graph is None:
            began = time.perf_counter()
            try:
                step = DecodeStep(self._model, self._pool, shape)
                graph = _Graph(step, self._capture(step))
            except Exception as error:
                raise CaptureFailed(str(error)) from error
            self.captured += 1
            logger.info("captured %s in %.2f s", shape, time.perf_counter() - began)
        self._graphs[shape] = graph  # the last used is the last
        if len(self._graphs) > MOST_GRAPHS:
            del self._graphs[next(iter(self._graphs))]
        return graph

    def _replay(self, graph: _Graph, rows: list[_Row]) -> Launched:
        self.replays += 1
        return Launched(graph, rows, fetch(graph.replay()))
