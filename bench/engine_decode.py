"""Decoding by the engine itself, per token, against the time it takes to read the weights once."""

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy as np
import torch
from shapes import bytes_per_step

from vtts_rt.config import EngineConfig
from vtts_rt.engine.engine import Engine
from vtts_rt.engine.sequence import FailedEvent, GenerationRequest
from vtts_rt.models.base import VideoLM
from vtts_rt.models.tokenizer import TEXT, EncodedPrompt
from vtts_rt.types import SamplingParams

PAGE_SIZE = 16
_WARM_UP = 8  # steps in which graphs are captured and kernels compiled
# How a step is launched, best first. Graphs need CUDA.
WAYS = ("graphs, a step ahead", "graphs", "eager")


class _NoText:
    """A tokenizer for random tokens: none ends anything, all are silent."""

    eos_token_ids: frozenset[int] = frozenset()

    def stream_decoder(self) -> _NoText:
        return self

    def push(self, token_id: int) -> str:
        return ""

    def finish(self) -> str:
        return ""


def decode_seconds(
    model: VideoLM, way: str, *, num_sequences: int, num_keys: int, num_steps: int
) -> dict[str, Any]:
    """Median seconds of a decoding step of the engine, everything included, and its counters.

    num_sequences prompts of num_keys random tokens that share nothing; then num_steps steps.
    """
    # While the last prompts are prefilled the first decode already.
    num_tokens = num_sequences * num_keys // EngineConfig().max_batch_tokens + _WARM_UP + num_steps
    total = num_keys + num_tokens
    page_bytes = model.kv.bytes_of(PAGE_SIZE)
    config = EngineConfig(
        page_size=PAGE_SIZE,
        kv_bytes=num_sequences * (total // PAGE_SIZE + 2) * page_bytes,
        prefix_cache=False,
        draft_tokens=0,
        cuda_graphs=way != "eager" and model.device.type == "cuda",
    )
    tokenizer: Any = _NoText()
    engine = Engine(model, tokenizer, config)
    engine._passes.runs_ahead = way == WAYS[0]
    rng = np.random.default_rng(0)
    for _ in range(num_sequences):
        ids = rng.integers(0, 1000, num_keys).tolist()
        prompt = EncodedPrompt(ids, (), np.full(num_keys, TEXT, np.uint8))
        sampling = SamplingParams(max_tokens=num_tokens + 1, ignore_eos=True)
        engine.add(GenerationRequest(prompt, sampling=sampling))
    times: list[float] = []
    while engine.has_work:
        began = time.perf_counter()
        events = engine.step()
        for event in events:
            if isinstance(event, FailedEvent):
                raise event.error
        # The steps in which every request gets a token and none ends.
        if len(events) == num_sequences:
            times.append(time.perf_counter() - began)
    return {
        "way": way,
        "sequences": num_sequences,
        "keys": num_keys,
        "steps": num_steps,
        "median_seconds": statistics.median(times[_WARM_UP:]),
        "passes": engine.stats()["passes"],
    }


def with_floor(result: dict[str, Any], model: VideoLM, bandwidth: float) -> dict[str, Any]:
    """A result with bytes per step and its share of the floor.

    bandwidth: bytes per second of a copy, read and written. floor: the time to read the weights
    once at that rate; floor_with_kv: and the keys and values of all sequences.
    """
    weights = bytes_per_step(model)
    keys = result["sequences"] * (result["keys"] + result["steps"] // 2)
    kv = model.kv.bytes_of(keys)
    seconds = result["median_seconds"]
    return {
        **result,
        "ms_per_step": round(1e3 * seconds, 3),
        "weight_bytes": weights,
        "kv_bytes": kv,
        "floor_ms": round(1e3 * weights / bandwidth, 3),
        "share_of_floor": round(weights / bandwidth / seconds, 3),
        "share_of_floor_with_kv": round((weights + kv) / bandwidth / seconds, 3),
    }


def measure(
    model: VideoLM, bandwidth: float, *, num_keys: int, num_steps: int
) -> list[dict[str, Any]]:
    """Batch 1 in every way, then batches of 8 and 32 in the best."""
    ways = WAYS if model.device.type == "cuda" else WAYS[-1:]
    cases = [(way, 1) for way in ways] + [(ways[0], size) for size in (8, 32)]
    with torch.inference_mode():
        return [
            with_floor(
                decode_seconds(
                    model, way, num_sequences=size, num_keys=num_keys, num_steps=num_steps
                ),
                model,
                bandwidth,
            )
            for way, size in cases
        ]
