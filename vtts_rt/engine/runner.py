"""Runner: one forward pass at a time over a sequence's next tokens.

Pixels are fetched, patchified and encoded only for pairs that the vision cache does not have.
"""

from __future__ import annotations

import time
from collections.abc import Hashable

import torch
from torch import Tensor

from vtts_rt.engine.kv_pool import PagedKVPool
from vtts_rt.engine.sequence import Sequence
from vtts_rt.engine.vision_cache import VisionCache
from vtts_rt.models.language import ForwardBatch, PagedKV
from vtts_rt.models.qwen2_5_vl import Qwen2_5_VL
from vtts_rt.ops.patchify import PatchifyJob, patchify
from vtts_rt.types import PATCH_SIZE, PairRef, Segment

# Patch rows after which a ViT pass is full: the first frames are encoded while the last are still
# being decoded, yet a look at a few pairs is one pass (480 rows a pair: five pairs took 0.65 s in
# one pass, 0.88 s in two; 15 pairs alike in passes of 4 to 15; 118 M model, 2 AVX2 cores).
_ROWS_PER_PASS = 3600
# Which resize the cached features went through (part of their key).
_RESIZE_KERNEL = "bicubic-antialias/uint8-cpu"


class Runner:
    """Feeds the model from a KV pool and a vision cache."""

    def __init__(self, model: Qwen2_5_VL, pool: PagedKVPool, cache: VisionCache) -> None:
        self.model = model
        self._pool = pool
        self._cache = cache

    def pair_key(self, segment: Segment, pair: PairRef) -> Hashable:
        """All that can change the features of a pair (see VisionCache)."""
        return (
            pair.video_id,
            pair.frame_a,
            pair.frame_b,
            segment.box,
            segment.resized_hw,
            _RESIZE_KERNEL,
            self.model.vision_version,
            str(self.model.dtype),
        )

    @torch.inference_mode()
    def hidden_states(self, sequence: Sequence, end: int, *, last_only: bool = False) -> Tensor:
        """Compute tokens [num_computed, end) of a sequence that owns enough pages.

        Returns their final hidden states (end - num_computed, hidden), or with `last_only` that
        of the last one (1, hidden), and advances the sequence.
        """
        start = sequence.num_computed
        embeds = self._embed(sequence, start, end)
        positions = torch.from_numpy(sequence.keys[start:end, 1:].T.copy())
        slots = self._slots(sequence, start, end)
        device = self.model.device
        batch = ForwardBatch(
            inputs_embeds=embeds,
            position_ids=positions.to(device),
            cu_seqlens_q=[0, end - start],
            kv=PagedKV(
                pages=self._pool.pages,
                page_table=torch.tensor([sequence.pages], dtype=torch.int64, device=device),
                slot_mapping=slots.to(device),
                seqlens_k=[end],
            ),
            last_only=last_only,
        )
        hidden: Tensor = self.model.language(batch)
        sequence.num_computed = end
        return hidden

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """(N, hidden) -> (N, V)."""
        return self.model.language.logits(hidden)

    def _slots(self, sequence: Sequence, start: int, end: int) -> Tensor:
        size = self._pool.page_size
        index = torch.arange(start, end)
        pages = torch.tensor(sequence.pages, dtype=torch.int64)
        return pages[index // size] * size + index % size

    def _embed(self, sequence: Sequence, start: int, end: int) -> Tensor:
        ids = torch.tensor(sequence.token_ids[start:end], device=self.model.device)
        embeds = self.model.language.embed(ids)
        if start >= sequence.num_prompt:
            return embeds
        embeds = embeds.clone()
        wanted = sequence.segments_between(start, end)
        features = self._features(sequence, wanted)
        for span_index, segment, pair_indices in wanted:
            span = sequence.request.prompt.spans[span_index]
            per_pair = segment.tokens_per_pair
            for pair in pair_indices:
                at = span.start + pair * per_pair
                low, high = max(at, start), min(at + per_pair, end)
                found = features[sequence.pair_keys[span_index][pair]]
                embeds[low - start : high - start] = found[low - at : high - at]
        return embeds

    def _features(
        self, sequence: Sequence, wanted: list[tuple[int, Segment, list[int]]]
    ) -> dict[Hashable, Tensor]:
        """Features of every wanted pair, from the cache or encoded now, each pair once."""
        features: dict[Hashable, Tensor] = {}
        missing: dict[Hashable, tuple[Segment, PairRef]] = {}
        for span_index, segment, pair_indices in wanted:
            for index in pair_indices:
                key = sequence.pair_keys[span_index][index]
                if key in features or key in missing:
                    continue
                found = self._cache.get(key)
                if found is None:
                    missing[key] = segment, segment.pairs[index]
                else:
                    features[key] = found
        sequence.reuse.pairs_reused += len(features)
        sequence.reuse.pairs_encoded += len(missing)
        if missing:
            self._encode(sequence, missing, features)
        return features

    def _encode(
        self,
        sequence: Sequence,
        missing: dict[Hashable, tuple[Segment, PairRef]],
        features: dict[Hashable, Tensor],
    ) -> None:
        provider = sequence.request.provider
        if provider is None:
            raise ValueError("generate: provider must be given for a prompt that holds vision")
        # Say all that will be wanted, so that decoding goes on while the first are encoded.
        by_video: dict[int, list[int]] = {}
        for _, pair in missing.values():
            by_video.setdefault(pair.video, []).extend((pair.frame_a, pair.frame_b))
        for video, frames in by_video.items():
            provider.prefetch(video, frames)
        items = list(missing.items())
        while items:
            rows, taken = 0, 0
            while taken < len(items) and (taken == 0 or rows <= _ROWS_PER_PASS):
                segment = items[taken][1][0]
                rows += segment.tokens_per_pair * 4
                taken += 1
            batch, items = items[:taken], items[taken:]
            for (key, _), found in zip(batch, self._encode_batch(sequence, batch), strict=True):
                features[key] = found
                self._cache.put(key, found)

    def _encode_batch(
        self, sequence: Sequence, batch: list[tuple[Hashable, tuple[Segment, PairRef]]]
    ) -> tuple[Tensor, ...]:
        provider = sequence.request.provider
        assert provider is not None
        clock = time.perf_counter
        began = clock()
        by_video: dict[int, list[int]] = {}
        for _, (_, pair) in batch:
            by_video.setdefault(pair.video, []).extend((pair.frame_a, pair.frame_b))
        frames = {
            (video, index): frame
            for video, wanted in by_video.items()
            for index, frame in zip(wanted, provider.frames(video, wanted), strict=True)
        }
        decoded = clock()
        jobs = [
            PatchifyJob(
                frames[pair.video, pair.frame_a],
                frames[pair.video, pair.frame_b],
                segment.box,
                segment.resized_hw,
            )
            for _, (segment, pair) in batch
        ]
        rows = patchify(jobs)
        patched = clock()
        grids = [
            (1, segment.resized_hw[0] // PATCH_SIZE, segment.resized_hw[1] // PATCH_SIZE)
            for _, (segment, _) in batch
        ]
        visual = self.model.visual(rows.to(self.model.device, self.model.dtype), grids)
        sizes = [segment.tokens_per_pair for _, (segment, _) in batch]
        timings = sequence.timings
        timings.decode += 1e3 * (decoded - began)
        timings.preprocess += 1e3 * (patched - decoded)
        timings.vision += 1e3 * (clock() - patched)
        return torch.split(visual, sizes)
