"""VisionEncoder where the tower takes frames itself, as on a GPU: here on the CPU."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from engine_tools import Frames, encode, look, make_engine, pair, run

from vtts_rt.engine import encoder
from vtts_rt.engine.vision_cache import VisionCache
from vtts_rt.models.base import ForwardBatch, VisionRows
from vtts_rt.models.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def narrow(model: Any) -> Any:
    return copy.deepcopy(model).float()


def engine_from_frames(narrow: Any, tokenizer: Tokenizer) -> Any:
    engine = make_engine(narrow, tokenizer)
    engine._encoder._from_frames = True
    return engine


class SharedFrames(Frames):
    """Hands out one object for a frame, as a store does."""

    def __init__(self, as_tensors: bool = False) -> None:
        super().__init__()
        self.held: dict[int, Any] = {}
        self.as_tensors = as_tensors

    def frames(self, video: int, frame_indices: Any) -> list[Any]:
        for index in frame_indices:
            frame = self.frame(index)
            frame.flags.writeable = False
            frame = torch.from_numpy(frame.copy()) if self.as_tensors else frame
            self.held.setdefault(index, frame)
        return [self.held[index] for index in frame_indices]


@pytest.mark.parametrize("as_tensors", [False, True])
@torch.inference_mode()
def test_frames_give_the_answer_of_rows_and_are_uploaded_once(
    narrow: Any, tokenizer: Tokenizer, as_tensors: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = []

    def pinned(frame: np.ndarray, device: torch.device) -> torch.Tensor:
        copied.append(frame)
        return real(frame, device)

    real = encoder._pinned
    monkeypatch.setattr(encoder, "_pinned", pinned)
    prompt = encode(tokenizer, "look ", look(pair(1, 2), pair(2), pair(1)), " say")
    frames = SharedFrames(as_tensors)
    found = run(engine_from_frames(narrow, tokenizer), prompt, frames)
    right = run(make_engine(narrow, tokenizer), prompt, Frames())
    assert found.token_ids == right.token_ids and found.reuse == right.reuse
    assert len(copied) == (0 if as_tensors else 2)
    assert found.timings.vision > 0 and found.timings.preprocess > 0


def test_features_of_a_folded_product_have_a_key_of_their_own(
    narrow: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def numerics(model: Any, device: str) -> str:
        with monkeypatch.context() as patch:
            patch.setattr(type(model), "device", torch.device(device))
            return encoder.VisionEncoder(model, VisionCache(0))._numerics

    half = copy.deepcopy(narrow).half()
    plain = numerics(half, "cpu")
    assert numerics(half, "cuda") == plain == numerics(narrow, "cuda")
    monkeypatch.setenv("VTTS_RT_BACKEND", "patch_embed=unfused")
    assert numerics(half, "cuda") == plain
    monkeypatch.setenv("VTTS_RT_BACKEND", "patch_embed=triton")
    assert numerics(half, "cuda") == "folded"
    assert numerics(narrow, "cuda") == plain, "float32 never folds"


def test_features_of_one_resize_kernel_are_not_those_of_another(
    narrow: Any, tokenizer: Tokenizer
) -> None:
    engine = make_engine(narrow, tokenizer)
    found = set()
    for resize in ("fixed", "float", "pil"):
        segment = dataclasses.replace(look(pair(1, 2)), resize=resize)
        prompt = encode(tokenizer, "look ", segment, " say")
        first = run(engine, prompt, Frames())
        assert (first.reuse.pairs_encoded, first.reuse.pairs_reused) == (1, 0), resize
        assert run(engine, prompt, Frames()).reuse.pairs_encoded == 0
        found.add(tuple(run(make_engine(narrow, tokenizer), prompt, Frames()).logprobs))
    assert len(found) == 3


@pytest.mark.parametrize("from_frames", [False, True])
def test_features_may_be_wider_than_the_hidden_size(
    narrow: Any, tokenizer: Tokenizer, from_frames: bool
) -> None:
    """Whole, in chunks that end inside a pair, and from the cache."""

    class Wide(type(narrow)):  # type: ignore[misc]
        @property
        def feature_dim(self) -> int:
            return 2 * super().feature_dim

        def encode(self, jobs: Any, rows: Any = None) -> torch.Tensor:
            return super().encode(jobs, rows).repeat(1, 2) / 2

        def forward(self, batch: ForwardBatch) -> torch.Tensor:
            if batch.vision is not None:
                rows, features = batch.vision
                assert features.shape[1] == self.feature_dim
                halves = features.view(len(features), 2, -1)
                batch = dataclasses.replace(batch, vision=VisionRows(rows, halves.sum(1)))
            return super().forward(batch)

    wide = copy.deepcopy(narrow)
    wide.__class__ = Wide
    prompt = encode(tokenizer, "look ", look(pair(1, 2), pair(2)), " say")
    right = run(make_engine(narrow, tokenizer), prompt, Frames())
    for chunk in (1024, 5):
        engine = make_engine(wide, tokenizer, max_batch_tokens=chunk, max_sequences=4)
        engine._encoder._from_frames = from_frames
        for pairs_encoded in (2, 0):
            found = run(engine, prompt, Frames())
            assert found.token_ids == right.token_ids
            assert found.logprobs == right.logprobs
            assert found.reuse.pairs_encoded == pairs_encoded
            engine.prefix_tree.clear()
        stats = engine.vision_cache.stats()
        assert stats["bytes"] == prompt.spans[0].length * wide.feature_dim * 4
