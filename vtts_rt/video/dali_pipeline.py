"""DALI's side of DaliSource: encoded streams in, decoded frames out."""

from __future__ import annotations

import io
from fractions import Fraction
from typing import Any, NamedTuple

import av
import numpy as np
import torch
from torch import Tensor

from vtts_rt import process
from vtts_rt.video.packets import num_decoder_threads

MAX_SAMPLES = 8  # streams decoded in one go
TICK = Fraction(1, 1000)  # Matroska's own unit: one a frame


class Sample(NamedTuple):
    """One encoded stream for DALI, and what is wanted of it.

    encoded: (N,) uint8, `num_packets` packets in Matroska. guard, numbers: which of the frames it
    shows are the guard, its last one, and the `frames` (indices in the video) asked for.
    """

    encoded: np.ndarray
    num_packets: int
    guard: int
    frames: list[int]
    numbers: list[int]


def muxed(packets: list[Any], ranks: list[int], template: Any) -> np.ndarray:
    """Packets as a Matroska stream, (N,) uint8: `ranks` say when each shows.

    Only the first is marked as a keyframe, or DALI would seek and what it skips go uncounted.
    """
    delay = max(position - rank for position, rank in enumerate(ranks))
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        stream = container.add_stream_from_template(template)
        for position, (packet, rank) in enumerate(zip(packets, ranks, strict=True)):
            packet.stream, packet.time_base = stream, TICK
            packet.dts, packet.pts = position, rank + delay
            packet.is_keyframe = position == 0
            container.mux(packet)
    return np.frombuffer(file.getvalue(), np.uint8)


def decode(samples: list[Sample], device: int | None) -> list[Tensor]:
    """Of each sample its guard and its frames, (1 + F, H, W, 3) uint8 on the device: DALI's own
    memory, handed over by DLPack. RuntimeError where it fails."""
    pipeline = _idle.take(device)
    try:
        pipeline.feed_input("encoded", [sample.encoded for sample in samples])
        wanted = [np.array([s.guard, *s.numbers], np.int32) for s in samples]
        pipeline.feed_input("frames", wanted)
        (batch,) = pipeline.run()
        frames = [torch.utils.dlpack.from_dlpack(batch[k]) for k in range(len(samples))]
    except Exception as error:  # the pipeline is of no use any more
        raise RuntimeError(_reason(str(error))) from None
    _idle.give_back(device, pipeline)
    return frames


def _reason(message: str) -> str:
    """The line that says it, of many: DALI puts it behind "encountered:"."""
    lines = [line for line in message.split("encountered:")[-1].splitlines() if line.strip()]
    return lines[0].strip() if lines else "it says nothing"


class _Idle:
    """Pipelines not in use, by device: building one takes 15 ms, and each serves one thread
    at a time. A forked process makes its own."""

    def __init__(self) -> None:
        self._pipelines: dict[int | None, list[Any]] = {}
        process.after_fork(self, _Idle._leave_to_parent)

    def take(self, device: int | None) -> Any:
        try:
            return self._pipelines[device].pop()
        except (KeyError, IndexError):
            return _build_pipeline(device)

    def give_back(self, device: int | None, pipeline: Any) -> None:
        self._pipelines.setdefault(device, []).append(pipeline)

    def _leave_to_parent(self) -> None:
        for pipelines in self._pipelines.values():
            process.never_free(*pipelines)
        self._pipelines = {}


_idle = _Idle()


def _build_pipeline(device: int | None) -> Any:
    from nvidia.dali import Pipeline, fn, types

    pipeline = Pipeline(
        batch_size=MAX_SAMPLES,
        num_threads=num_threads(device),
        device_id=device,
        prefetch_queue_depth=1,
        exec_dynamic=True,
    )
    with pipeline:
        encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
        frames = fn.external_source(name="frames", dtype=types.INT32, ndim=1)
        kind = "cpu" if device is None else "mixed"
        pipeline.set_outputs(fn.decoders.video(encoded, frames=frames, device=kind))
    pipeline.build()
    return pipeline


def num_threads(device: int | None) -> int:
    """Streams decoded at once; a GPU has several decoders, each fed by a thread of its own."""
    return num_decoder_threads() if device is None else MAX_SAMPLES
