"""VisionEncoder: pixels to features, only for frame pairs that no cache has.

Pairs wanted by all sequences of a pass are encoded together, each once. Pixels are asked for on
a miss only, and announced (`prefetch`) long before.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Hashable, Iterable

import numpy as np
import torch
from torch import Tensor

from vtts_rt.engine.sequence import Chunk, PairPlace, Sequence
from vtts_rt.engine.vision_cache import VisionCache
from vtts_rt.models.base import VideoLM
from vtts_rt.ops.patchify import PatchBuffer, PatchifyJob, patchify
from vtts_rt.types import Frame, PairRef, Segment

logger = logging.getLogger(__name__)

# Most patch rows of a ViT pass (a pair of more goes alone): the first frames are encoded while the
# last are still being decoded. A CPU's is what the tower takes at once anyway, two pairs of 480
# rows: a first look takes 2.89 s, 3.11 in passes of eight pairs, which wait 0.35 s for the decoder
# before they encode anything (118 M model, 2 cores). An accelerator needs large ones.
_ROWS_PER_CPU_PASS, _ROWS_PER_PASS = 1024, 3600

Features = dict[Hashable, Tensor]


class VisionEncoder:
    """Features of frame pairs from a cache, or from a request's frames and the vision tower."""

    def __init__(self, model: VideoLM, cache: VisionCache) -> None:
        self._model = model
        self._cache = cache
        self._rows = PatchBuffer(model.geometry)
        # Resized where the tower is: frames are transferred as bytes, and the CPU is left alone.
        self._from_frames = model.device.type != "cpu"
        self._numerics = model.numerics

    def pair_key(self, segment: Segment, pair: PairRef) -> Hashable:
        """All that can change the features of a pair (see VisionCache)."""
        return (
            pair.video_id,
            pair.frame_a,
            pair.frame_b,
            segment.box,
            segment.resized_hw,
            segment.resize,
            self._numerics,
            self._model.version("visual"),
            str(self._model.dtype),
        )

    def prefetch(self, sequence: Sequence) -> None:
        """Tell the provider which frames the rest of a prompt will want; returns at once."""
        provider = sequence.request.provider
        if provider is None:
            return
        pending = sequence.pairs_between(sequence.num_computed, sequence.num_prompt)
        try:
            for video, frames in _frames_by_video(self._missing(sequence, pending)).items():
                provider.prefetch(video, frames)
        except Exception as error:  # only a hint: what is missing is asked for again
            logger.warning("frames cannot be fetched ahead: %s", error)

    def end_of_ready(self, sequence: Sequence, start: int, end: int) -> int:
        """Up to where tokens [start, end) can be computed without waiting for a frame."""
        provider = sequence.request.provider
        try:
            for place in self._missing(sequence, sequence.pairs_between(start, end)):
                pair = place.pair
                if provider and not provider.ready(pair.video, (pair.frame_a, pair.frame_b)):
                    return max(start, place.start)
        except Exception as error:  # the provider is broken: asking for its frames will raise
            logger.debug("readiness of frames is unknown: %s", error)
        return end

    def _missing(self, sequence: Sequence, places: Iterable[PairPlace]) -> list[PairPlace]:
        held, cache = sequence.held, self._cache
        return [place for place in places if place.key not in held and place.key not in cache]

    @torch.inference_mode()
    def features(self, chunks: list[Chunk]) -> tuple[Features, list[tuple[Sequence, Exception]]]:
        """Features of every pair in the chunks, and the sequences whose pixels failed.

        A failure concerns its own sequence only: what others wanted from the same pass is
        encoded again without it.
        """
        features: Features = {}
        jobs: list[tuple[Sequence, PairPlace]] = []
        try:
            for chunk in chunks:
                jobs += self._look_up(chunk, features, {place.key for _, place in jobs})
            self._encode(jobs, features)
            return features, []
        except Exception as error:
            if len(chunks) == 1:
                return features, [(chunks[0].sequence, error)]
        # Each sequence alone, to find the one that fails.
        failures = []
        for chunk in chunks:
            try:
                self._encode(self._look_up(chunk, features, set(), count=False), features)
            except Exception as error:
                failures.append((chunk.sequence, error))
        return features, failures

    def _look_up(
        self, chunk: Chunk, features: Features, claimed: set[Hashable], count: bool = True
    ) -> list[tuple[Sequence, PairPlace]]:
        """Add what is cached to `features`; return what is not, less what is `claimed`."""
        sequence, missing = chunk.sequence, []
        for place in sequence.pairs_between(chunk.start, chunk.end):
            key = place.key
            if key in features or key in claimed:
                sequence.reuse.pairs_reused += count
                continue
            found = sequence.held.get(key)
            if found is None and (found := self._cache.get(key)) is not None:
                sequence.reuse.pairs_reused += count
            if found is None:
                missing.append((sequence, place))
                claimed.add(key)
                sequence.reuse.pairs_encoded += count
            else:
                features[key] = found
        return missing

    def _encode(self, jobs: list[tuple[Sequence, PairPlace]], features: Features) -> None:
        jobs = [job for job in jobs if job[1].key not in features]
        most = _ROWS_PER_PASS if self._from_frames else _ROWS_PER_CPU_PASS
        rows_per_token = self._model.geometry.patches_per_token
        while jobs:
            rows, taken = 0, 0
            for _, place in jobs:
                rows += place.segment.tokens_per_pair * rows_per_token
                if taken and rows > most:
                    break
                taken += 1
            batch, jobs = jobs[:taken], jobs[taken:]
            for (_, place), found in zip(batch, self._encode_pass(batch), strict=True):
                features[place.key] = found
                self._cache.put(place.key, found)

    def _encode_pass(self, batch: list[tuple[Sequence, PairPlace]]) -> tuple[Tensor, ...]:
        clock = time.perf_counter
        began = clock()
        jobs = []
        owners = {sequence.request_id: sequence for sequence, _ in batch}
        frames: dict[tuple[int, int, int], Frame] = {}
        for sequence in owners.values():
            frames |= _frames(sequence, [place for own, place in batch if own is sequence])
        decoded = clock()
        if self._from_frames:
            frames = _uploaded(frames, self._model.device)
        for sequence, place in batch:
            pair, segment = place.pair, place.segment
            frame_a, frame_b = (
                frames[sequence.request_id, pair.video, index]
                for index in (pair.frame_a, pair.frame_b)
            )
            view = (segment.box, segment.resized_hw, segment.resize)
            jobs.append(PatchifyJob(frame_a, frame_b, *view))
        rows = None
        if not self._from_frames:
            rows = patchify(jobs, self._model.geometry, out=self._rows.rows_for(jobs))
        patched = clock()
        features = self._model.encode(jobs, rows)
        for sequence in owners.values():
            timings = sequence.timings
            timings.decode += 1e3 * (decoded - began)
            timings.preprocess += 1e3 * (patched - decoded)
            timings.vision += 1e3 * (clock() - patched)
        return torch.split(features, [place.segment.tokens_per_pair for _, place in batch])


def _uploaded(
    frames: dict[tuple[int, int, int], Frame], device: torch.device
) -> dict[tuple[int, int, int], Frame]:
    """The same on `device`, without waiting for it: each object once, as requests for one video
    share frames; what is on a GPU already stays."""
    found: dict[int, Tensor] = {}
    for frame in frames.values():
        if id(frame) not in found:
            there = frame if isinstance(frame, Tensor) else _pinned(frame, device)
            found[id(frame)] = there.to(device, non_blocking=True)
    return {place: found[id(frame)] for place, frame in frames.items()}


def _pinned(frame: np.ndarray, device: torch.device) -> Tensor:
    """A copy that `device` fetches by itself."""
    copy = torch.empty(frame.shape, dtype=torch.uint8, pin_memory=device.type == "cuda")
    np.copyto(copy.numpy(), frame)
    return copy


def _frames(sequence: Sequence, places: list[PairPlace]) -> dict[tuple[int, int, int], Frame]:
    """(request, video, frame index) -> frame, of all pairs; waits for them."""
    provider = sequence.request.provider
    if provider is None:
        raise ValueError(
            "generate: provider must be given for a prompt that holds vision, got None"
        )
    return {
        (sequence.request_id, video, index): frame
        for video, wanted in _frames_by_video(places).items()
        for index, frame in zip(wanted, provider.frames(video, wanted), strict=True)
    }


def _frames_by_video(places: Iterable[PairPlace]) -> dict[int, list[int]]:
    wanted: dict[int, list[int]] = {}
    for place in places:
        pair = place.pair
        wanted.setdefault(pair.video, []).extend((pair.frame_a, pair.frame_b))
    return wanted
