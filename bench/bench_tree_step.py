"""One gradient step of a rollout group: full rows as trainers pack them, and their token tree.

    python bench/bench_tree_step.py [--case P/C,..] [--dtype D,D] [--runs N] [--result-dir DIR]

A case is a prompt of P tokens, nearly all of a video, and C tokens that each member answers. Sides,
each in a process of its own and in turn, run forward and backward passes of transformers' model
with a frozen tower: "pixels", all rows with all their pixels; "cached", all rows with features of
the tower; "tree", `tree_logprobs` with the same features. Rows are of one length, so that nothing
is padded, and all sides score the members' tokens alone, by the same head in chunks; so does TRL
1.16 where it has Triton (on a CPU it scores prompts too, which is not measured here). They must
agree in every log-probability and in the norm of every gradient. Memory is the most that a process
held, model and libraries included.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, NamedTuple

import numpy as np
import torch
from shapes import SHAPES, hf_config
from torch import Tensor

from vtts_rt import bench
from vtts_rt.bench.model import SEED
from vtts_rt.bench.setting import (
    add_compute_flags,
    add_output_flags,
    check_compute,
    command_line,
    origin,
)
from vtts_rt.models.mrope import MropePositions
from vtts_rt.models.qwen2_5_vl import GEOMETRY
from vtts_rt.models.registry import DTYPES
from vtts_rt.models.tokenizer import VisionSpan
from vtts_rt.rollout.rows import RolloutRow
from vtts_rt.rollout.tree import TokenTree
from vtts_rt.rollout.tree_step import ScoringHead, tree_logprobs, use_tree_attention
from vtts_rt.types import MERGE_SIZE, PairRef, PixelBox, Segment, require

SIDES = ("pixels", "cached", "tree")
GRID = (20, 26)  # patches of a frame pair: 280 x 364 px, 130 tokens
# Most that the sides may differ in a log-probability, and in the norm of a gradient as a part of
# it; in bfloat16 sides that sum in another order differ by more than means anything.
TOLERANCES = {"float32": (1e-3, 1e-3)}


class Case(NamedTuple):
    prompt: int
    answer: int
    members: int


def add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--case", default="1000/64,4000/64,4000/256", help="prompt and answer tokens")
    add("--members", type=int, default=8)
    add("--shape", choices=tuple(SHAPES), default="118m", help="of Qwen2.5-VL, random weights")
    add("--dtype", default="float32,bfloat16", help=f"of {', '.join(DTYPES)}, comma-separated")
    add("--runs", type=int, default=3, help="of each side, in turn")
    add("--pixels-answer", type=int, default=64, help="longest answers run with pixels too")
    add("--checkpointing", action="store_true", help="of gradients, on all sides")
    add_compute_flags(parser, dtypes=())
    add_output_flags(parser)


def theme(args: argparse.Namespace) -> str:
    """What its result is filed under."""
    return "treestep"


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The result (the JSON file's content)."""
    check_compute(args)
    require("bench", "runs", args.runs, args.runs >= 1, ">= 1")
    require("bench", "members", args.members, args.members >= 2, ">= 2")
    dtypes = args.dtype.split(",")
    for name in dtypes:
        require("bench", "dtype", name, name in DTYPES, f"of {', '.join(DTYPES)}")
    cases = []
    for text in args.case.split(","):
        numbers = text.split("/")
        fits = len(numbers) == 2 and all(n.isdecimal() and int(n) > 0 for n in numbers)
        least = _tokens_of_pair() + 4
        fits = fits and int(numbers[0]) >= least
        require("bench", "case", text, fits, f"PROMPT/ANSWER, e.g. 1000/64, PROMPT >= {least}")
        cases.append(Case(*map(int, numbers), args.members))
    flags = ("case", "members", "shape", "dtype", "runs", "pixels_answer", "checkpointing")
    runs, failures = [], []
    for dtype in dtypes:
        for case in cases:
            run = _compare(args, dtype, case)
            runs.append(run)
            print(_line(run), file=sys.stderr)
            for name, least in zip(
                ("logprob", "gradient"), TOLERANCES.get(dtype, ()), strict=False
            ):
                if not run[f"worst_{name}"] <= least:
                    failures.append(f"{_line(run)}: {name} differs by {run[f'worst_{name}']:.2g}")
    return {
        "bench": theme(args),
        "command": command_line("tree_step", args, (*flags, "device", "threads")),
        **origin(args.threads),
        "setting": {"shape": args.shape, "checkpointing": args.checkpointing},
        "runs": runs,
        "failures": failures,
    }


def processes() -> Executor:
    """For one side; replaced in tests."""
    return ProcessPoolExecutor(1, get_context("spawn"))


def _compare(args: argparse.Namespace, dtype: str, case: Case) -> dict[str, Any]:
    names = SIDES if case.answer <= args.pixels_answer else SIDES[1:]
    pools = {name: processes() for name in names}
    try:
        sides = [args.shape, args.device, dtype, args.threads, args.checkpointing, case]
        for name, pool in pools.items():
            pool.submit(prepare, name, *sides).result()
        found: dict[str, list[Outcome]] = {name: [] for name in names}
        for _ in range(args.runs):
            for name, pool in pools.items():
                found[name].append(pool.submit(step, name).result())
    finally:
        for pool in pools.values():
            pool.shutdown()
    seconds = {name: statistics.median(o.seconds for o in own) for name, own in found.items()}
    peaks = {name: max(o.peak_mb for o in own) for name, own in found.items()}
    last = {name: own[-1] for name, own in found.items()}
    others = [name for name in names if name != "tree"]
    tree = last["tree"]
    return {
        "dtype": dtype,
        **case._asdict(),
        "tree_tokens": tree.num_tokens,
        "row_tokens": last["cached"].num_tokens,
        "sides": {
            name: {
                "seconds": [round(o.seconds, 3) for o in own],
                "median_seconds": round(seconds[name], 3),
                "peak_mb": round(peaks[name]),
            }
            for name, own in found.items()
        },
        "times_as_fast": {name: round(seconds[name] / seconds["tree"], 2) for name in others},
        "memory_share": {name: round(peaks["tree"] / peaks[name], 3) for name in others},
        "worst_logprob": max(_worst(last[n].logprobs, tree.logprobs) for n in others),
        "worst_gradient": max(
            float(np.max(np.abs(last[n].norms - tree.norms) / last[n].norms)) for n in others
        ),
    }


def _worst(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.max(np.abs(a - b)))


# -- in the process of a side ---------------------------------------------------------------------


class Outcome(NamedTuple):
    """logprobs: (members * answer,). norms: of the gradient of every parameter that has one."""

    seconds: float
    peak_mb: float
    num_tokens: int
    logprobs: np.ndarray
    norms: np.ndarray


_READY: dict[str, Callable[[], Outcome]] = {}


def prepare(
    name: str, shape: str, device: str, dtype: str, threads: int, checkpointing: bool, case: Case
) -> None:
    """Build the model, run the tower and, on a small group, a step that counts for nothing."""
    torch.set_num_threads(threads)
    vocab = SHAPES[shape]["text_config"]["vocab_size"]
    config = hf_config(shape, image_token_id=vocab - 2, video_token_id=vocab - 1)
    from transformers import Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(SEED)
    with torch.device(device):
        model = Qwen2_5_VLForConditionalGeneration._from_config(config, attn_implementation="sdpa")
    model = model.to(DTYPES[dtype]).train()
    model.model.visual.requires_grad_(False)
    if checkpointing:
        model.gradient_checkpointing_enable()
    if name == "tree":
        use_tree_attention(model)
    group = _Group(model, Case(_tokens_of_pair() + 8, 4, case.members))
    _run(getattr(group, name), model)
    group = _Group(model, case)
    _READY[name] = lambda: _run(getattr(group, name), model)


def step(name: str) -> Outcome:
    return _READY[name]()


def _run(side: Callable[[], tuple[int, Tensor]], model: Any) -> Outcome:
    """One forward and backward pass; time, memory and what came out."""
    on_gpu = model.device.type == "cuda"
    model.zero_grad()
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    began = time.perf_counter()
    num_tokens, logprobs = side()
    # Of every token another sign, as advantages have.
    weights = torch.linspace(0, 50, len(logprobs), device=logprobs.device).sin()
    (logprobs @ weights).backward()
    if on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peak = torch.cuda.max_memory_allocated() if on_gpu else peak
    grads = [p.grad.float().norm().item() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    if on_gpu:
        torch.cuda.empty_cache()
    out = logprobs.detach().float().cpu().numpy()
    return Outcome(seconds, peak / 1e6, num_tokens, out, np.array(grads))


def _tokens_of_pair() -> int:
    return GRID[0] * GRID[1] // MERGE_SIZE**2


class _Group:
    """Rows of a case with random text and pixels, and a step of each side."""

    def __init__(self, model: Any, case: Case) -> None:
        rng = np.random.default_rng(SEED)
        self.model, self.case = model, case
        vision = model.config.vision_config
        num_pairs = (case.prompt - 4) // _tokens_of_pair()
        grid = (num_pairs, *GRID)
        text = case.prompt - num_pairs * _tokens_of_pair()
        vocab = model.config.image_token_id
        words = rng.integers(0, vocab, text)
        pads = np.full(num_pairs * _tokens_of_pair(), model.config.video_token_id)
        prompt = np.concatenate((words[: text // 2], pads, words[text // 2 :]))
        rope = MropePositions("transformers", float(vision.tokens_per_second))
        positions = [rope.text(text // 2), rope.vision(grid), rope.text(text - text // 2)]
        position_ids = torch.cat([*positions, rope.text(case.answer)], 1).numpy()
        size = GRID[0] * vision.patch_size, GRID[1] * vision.patch_size
        pairs = tuple(PairRef(0, "video", 2 * i, 2 * i + 1, float(i)) for i in range(num_pairs))
        segment = Segment(pairs, PixelBox(0, 0, size[1], size[0]), size, GEOMETRY)
        spans = (VisionSpan(text // 2, len(pads), segment),)
        mask = np.arange(len(prompt) + case.answer) >= len(prompt)
        self.rows = []
        for member in range(case.members):
            said = rng.integers(0, vocab, case.answer)
            said[0] = member  # they part at once
            ids, drawn = np.concatenate((prompt, said)), np.where(mask, -1.0, np.nan)
            self.rows.append(RolloutRow(ids, mask, drawn, position_ids, spans))
        self.grid = torch.tensor([grid], device=model.device)
        shape = num_pairs * GRID[0] * GRID[1], GEOMETRY.row_size
        rows = torch.from_numpy(rng.standard_normal(shape))
        self.patches = rows.to(model.device, model.dtype)
        with torch.no_grad():
            out = model.get_video_features(self.patches, self.grid, return_dict=True)
        self.features = torch.cat(out.pooler_output)

    def tree(self) -> tuple[int, Tensor]:
        tree = TokenTree.of(self.rows)
        return len(tree), tree_logprobs(self.model, tree, self.features).logprobs

    def cached(self) -> tuple[int, Tensor]:
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        pooled = (self.features,) * self.case.members
        outputs = {"video": BaseModelOutputWithPooling(pooler_output=pooled)}
        return self._full(mm_encoder_outputs=outputs)

    def pixels(self) -> tuple[int, Tensor]:
        members = self.case.members
        patches, grid = self.patches.repeat(members, 1), self.grid.repeat(members, 1)
        return self._full(pixel_values_videos=patches, video_grid_thw=grid)

    def _full(self, **vision: Any) -> tuple[int, Tensor]:
        device = self.model.device
        ids = torch.from_numpy(np.stack([row.token_ids for row in self.rows])).to(device)
        positions = np.stack([row.position_ids for row in self.rows], 1)
        out = self.model.model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            position_ids=torch.from_numpy(positions).to(device),
            use_cache=False,
            **vision,
        )
        answer = self.case.answer
        hidden = out.last_hidden_state[:, -answer - 1 : -1].flatten(0, 1)
        head = ScoringHead(ids[:, -answer:].flatten(), 1.0, 1024)
        scores = head.score(self.model.lm_head.forward, hidden[None])
        return ids.numel(), scores[0, :, 0]


def _line(run: dict[str, Any]) -> str:
    sides = ", ".join(
        f"{name} {side['median_seconds']:.2f} s {side['peak_mb'] / 1e3:.1f} GB"
        for name, side in run["sides"].items()
    )
    return f"{run['dtype']} {run['prompt']}/{run['answer']}: {sides}"


def print_table(result: dict[str, Any]) -> None:
    """The result for people."""
    for run in result["runs"]:
        print(f"{_line(run)}; times as fast: {run['times_as_fast']}", end="")
        print(f", memory: {run['memory_share']}", end="")
        print(f"; differs by {run['worst_logprob']:.2g}, {run['worst_gradient']:.2g}")


if __name__ == "__main__":
    sys.exit(bench.script(sys.modules[__name__]))
