"""The whole engine on Triton's kernels, in their interpreter: what a GPU runs, captures aside."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from triton_tools import run_triton

# Prefill, decoding, an appended round that finds the first one's KV, two members that share pages.
SCRIPT = """
import json, sys
from dataclasses import replace
from functools import partial

import torch

torch.set_num_threads(1)
sys.path.insert(0, "tests")
from engine_tools import Frames, encode, finish, look, pair, run
from utils import VOCAB_SIZE, tiny_tokenizer

from vtts_rt.config import EngineConfig
from vtts_rt.models.config import LanguageConfig, ModelConfig
from vtts_rt.models.qwen2_5_vl import GEOMETRY, Qwen2_5_VL, VisionConfig
from vtts_rt.engine import graphs, runner
from vtts_rt.models import attention, qwen3_vl
from vtts_rt.engine.engine import Engine
from vtts_rt.engine.passes import Passes
from vtts_rt.engine.sequence import FinishedEvent, GenerationRequest
from vtts_rt.models.registry import from_config
from vtts_rt.models.qwen2_5_vl.chat import CHAT
from vtts_rt.models.tokenizer import Tokenizer
from vtts_rt.ops.cascade_attention import find_groups
from vtts_rt.ops.dispatch import interpreted
from vtts_rt.types import SamplingParams

tokenizer = Tokenizer(tiny_tokenizer(), CHAT)
config = ModelConfig(
    model_type=Qwen2_5_VL.model_type,
    geometry=GEOMETRY,
    vision=VisionConfig(1, 32, 2, 48, 64, fullatt_block_indexes=(0,)),
    language=LanguageConfig(VOCAB_SIZE, 64, 96, 2, 4, 2, 1e4, (2, 3, 3)),
    image_token_id=tokenizer.image_token_id,
    video_token_id=tokenizer.video_token_id,
    vision_start_token_id=tokenizer.vision_start_token_id,
    vision_end_token_id=tokenizer.vision_end_token_id,
    eos_token_ids=tuple(tokenizer.eos_token_ids),
)
if FAMILY == "qwen3_vl":  # features for two layers, norms of queries and keys
    config = replace(
        config,
        model_type=FAMILY,
        vision=qwen3_vl.VisionConfig(1, 32, 2, 48, 64, 25, (0,)),
        language=replace(
            config.language, qk_norm=True, qkv_bias=False, mrope_interleaved=True
        ),
    )
model = from_config(config, device=DEVICE)
with torch.no_grad():
    for parameter in model.parameters():
        parameter.mul_(8 if parameter.ndim == 2 else 1)
settings = EngineConfig(page_size=4, kv_bytes=1 << 20, draft_tokens=0, cuda_graphs=GRAPHS)
engine = Engine(model, tokenizer, settings)


def capture(step):
    step()
    return step


if interpreted():  # graphs that are captured by being called again
    engine._passes = Passes(model, engine.pool, on_device=True, capture=capture)
for module in (attention, graphs):
    module.find_groups = partial(find_groups, min_group=2, min_shared=8)

if DEVICE == "cuda":  # a pass asks the host nothing
    model.language._frequencies(model.device)
    forward = runner.Runner.forward

    def watched(*args):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return forward(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    runner.Runner.forward = watched

GREEDY = SamplingParams(max_tokens=5, ignore_eos=True)
first = encode(tokenizer, "look ", look(pair(1)), " say")
one = run(engine, first, Frames(), sampling=GREEDY)
both = first.extended(one.token_ids) + encode(tokenizer, " more ", look(pair(2)), " say")
two = run(engine, both, Frames(), sampling=GREEDY)
assert two.reuse.tokens_reused == len(first) + 4
sampled = SamplingParams(max_tokens=5, temperature=1.0, ignore_eos=True)
for member in range(2):
    engine.add(GenerationRequest(both, provider=Frames(), sampling=sampled, member=member))
ends = [one, two]
while engine.has_work:
    ends += [e.completion for e in engine.step() if isinstance(e, FinishedEvent)]
engine.check_integrity()
stats = engine.stats()["passes"]
print(json.dumps([[e.token_ids for e in ends], [e.logprobs for e in ends], stats]))
"""


FAMILIES = ("qwen2_5_vl", "qwen3_vl")
Told = tuple[list[list[int]], list[list[float]], dict[str, Any]]


def told(family: str, device: str, *, graphs: bool | None = None, interpret: bool = False) -> Told:
    """Tokens and log-probabilities of all answers, and counters."""
    script = f"FAMILY, DEVICE, GRAPHS = {family!r}, {device!r}, {graphs}\n{SCRIPT}"
    tokens, logprobs, stats = json.loads(run_triton(script, interpret=interpret))
    return tokens, logprobs, stats


def compare(found: Told, right: Told) -> None:
    assert found[0] == right[0]
    for logprobs, expected in zip(found[1], right[1], strict=True):
        assert logprobs == pytest.approx(expected, abs=1e-3)
    assert right[2]["graph_replays"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_engine_on_triton_says_what_it_says_on_the_cpu(family: str) -> None:
    found = told(family, "cpu", interpret=True)
    compare(found, told(family, "cpu"))
    stats = found[2]
    assert stats["graphs"] == "on" and stats["steps_ahead"] >= 3 * 3
    assert stats["graphs_captured"] >= 2


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("family", FAMILIES)
def test_graphs_on_a_gpu_say_what_single_passes_say(family: str) -> None:
    found = told(family, "cuda")
    compare(found, told(family, "cuda", graphs=False))
    assert found[2]["graphs"] == "on" and found[2]["steps_ahead"] >= 3 * 3
    compare(found, told(family, "cpu"))
