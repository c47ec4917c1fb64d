"""A rollout group of several rounds against transformers' generate and vLLM, decoding included.

    python bench/bench_rollouts.py [--dtype D,D] [--repeats N] [--vllm-python PATH] [--result-dir D]

Every side samples the same number of answers at temperature 1, with forced clues and a fixed number
of tokens a round: once with the same clue for all members, the best case of a published loop, whose
rounds are then one prompt with `num_return_sequences` or `n`; once with a clue of its own for each,
for which a published loop needs a prompt a member and round. Runs alternate, all cold: a fresh copy
of the file, caches cleared.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vtts_rt.bench import script
from vtts_rt.bench.frames import FileReader
from vtts_rt.bench.peer import PublishedLoop, file_metadata
from vtts_rt.bench.rounds import PEERS, add_peer_flags, asked_alike, peers_of, vllm_peer, words_of
from vtts_rt.bench.setting import (
    OPTIONS,
    QUESTIONS,
    Setting,
    add_setting_flags,
    check_compute,
    heading,
    model_and_video,
    strategies_of,
    video_name,
)
from vtts_rt.config import EngineConfig, RuntimeConfig
from vtts_rt.models.qwen2_5_vl.chat import CHAT
from vtts_rt.models.registry import DTYPES
from vtts_rt.perception.clue import Clue, clue_from_json
from vtts_rt.perception.plan import RoundHistory
from vtts_rt.perception.strategy import build_prompt, plan_round
from vtts_rt.rounds.ask import Ask
from vtts_rt.runtime import Runtime
from vtts_rt.types import StrategyName, VideoMetadata, require

SEED = 1
# Lengths of the clues after each round, as shares of the duration: those of `bench rounds`.
SHARES = (10 / 60, 4 / 60, 2 / 60, 1 / 60)
COUNTERS = ("files_opened", "frames_decoded", "pairs_encoded", "tokens_prefilled")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """See `--help`."""
    add_setting_flags(parser, strategy="official,append", several_dtypes=True)
    add = parser.add_argument
    add("--num-answers", type=int, default=8, help="members of the group")
    add("--clues", default="same,own", help="same: for all members; own: for each")
    add("--repeats", type=int, default=3, help="runs of each side")
    add_peer_flags(parser, "hf")


def theme(args: argparse.Namespace) -> str:
    """What its result is filed under."""
    return "rollouts"


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The result's JSON; arguments as `--help` says."""
    strategies, peers, kinds = strategies_of(args), peers_of(args), args.clues.split(",")
    for name in ("repeats", "max_tokens"):
        require("bench", name, getattr(args, name), getattr(args, name) >= 1, ">= 1")
    require("bench", "num_answers", args.num_answers, args.num_answers >= 2, ">= 2")
    for kind in kinds:
        require("bench", "clues", kind, kind in ("same", "own"), "of same, own")
    dtypes = (args.dtype or "float32").split(",")
    for name in dtypes:
        require("bench", "dtype", name, name in DTYPES, f"of {', '.join(DTYPES)}")
    check_compute(args)
    folder, video, metadata = model_and_video(args)
    setting = Setting.of(args, metadata.duration_seconds)
    runs, about = [], None
    for dtype in dtypes:
        with ExitStack() as stack:
            bench = _Bench(args, stack, folder, metadata, setting, dtype, strategies, peers)
            for kind in kinds:
                runs.append({"dtype": dtype, "clues": kind, **bench.run(video, kind)})
            about = bench.about_vllm or about
    flags = [
        "peer",
        "strategy",
        "clues",
        "num_answers",
        "rounds",
        "max_tokens",
        "repeats",
        "device",
    ]
    flags += ["dtype", "threads", "footage", "video", "model", "parity", "vllm_compile"]
    return {
        **heading("rollouts", args, flags),
        "setting": {
            **setting.as_dict(video_name(args), metadata, bench.resolved),
            "num_answers": args.num_answers,
            "temperature": 1.0,
            "repeats": args.repeats,
            "own_clues": [[c[0] for c in own] for own in _clues(args, setting, metadata, "own")],
            "unmeasured": "loading the models; a warm-up of one round and two tokens a side",
        },
        "vllm": about,
        "runs": runs,
    }


def _clues(
    args: argparse.Namespace, setting: Setting, metadata: VideoMetadata, kind: str
) -> list[list[list[list[float]]]]:
    """The clues of every member, a list of `[[start, end]]` a round but the last."""
    if kind == "same":
        return [setting.clues] * args.num_answers
    duration = metadata.duration_seconds
    own = []
    for member in range(args.num_answers):
        # Evenly from the first place where the longest fits to the last.
        middle = SHARES[0] / 2 + (1 - SHARES[0]) * member / (args.num_answers - 1)
        halves = [share / 2 for share in SHARES[: setting.rounds - 1]]
        spans = [[(middle - half) * duration, (middle + half) * duration] for half in halves]
        own.append([[[round(second, 6) for second in span]] for span in spans])
    return own


Group = Callable[[Path, Setting, Sequence[Sequence[Any]]], dict[str, int]]


class _Bench:
    """All sides in one dtype. resolved: the budgets of all; about_vllm: how vLLM ran."""

    def __init__(
        self,
        args: argparse.Namespace,
        stack: ExitStack,
        folder: Path,
        metadata: VideoMetadata,
        setting: Setting,
        dtype: str,
        strategies: list[StrategyName],
        peers: list[str],
    ) -> None:
        self._args, self._metadata, self._setting = args, metadata, setting
        self._strategies, self._peers = strategies, peers
        self._words = words_of(folder)
        self._runtime = stack.enter_context(
            Runtime.from_pretrained(
                folder,
                dtype=dtype,
                device=args.device,
                engine=EngineConfig(draft_tokens=args.draft_tokens),
                config=RuntimeConfig(threads=args.threads),
            )
        )
        self.resolved = self._runtime.perception(setting.perception(strategies[0]))
        self.about_vllm: dict[str, Any] | None = None
        self._sides: dict[str, tuple[Group, Callable[[], None]]] = {}
        if "hf" in peers:
            loop = GroupLoop.from_pretrained(folder, dtype=DTYPES[dtype], device=args.device)
            assert isinstance(loop, GroupLoop)
            self._sides[PEERS["hf"].label] = self._loop(loop), lambda: None
        if any(name.startswith("vllm") for name in peers):
            vllm = stack.enter_context(vllm_peer(args, folder, dtype))
            self.about_vllm = vllm.about
            for name in peers:
                if name.startswith("vllm"):
                    self._sides[PEERS[name].label] = self._vllm(vllm, name), vllm.forget
        for strategy in strategies:
            self._sides[strategy] = self._ours(strategy), self._runtime.clear_caches

    def run(self, video: Path, kind: str) -> dict[str, Any]:
        """Runs of all sides, one after the other, and ours against the peers."""
        clues = _clues(self._args, self._setting, self._metadata, kind)
        brief = replace(self._setting, rounds=1, max_tokens=2, clues=[])
        seconds: dict[str, list[float]] = {name: [] for name in self._sides}
        counted: dict[str, dict[str, int]] = {}
        for group, _ in self._sides.values():
            group(video, brief, [[]] * self._args.num_answers)
        with tempfile.TemporaryDirectory() as folder:
            for repeat in range(self._args.repeats):
                for name, (group, forget) in self._sides.items():
                    # Content hashes are remembered by file identity: a cold run pays for them.
                    path = Path(folder) / f"{repeat}-{name}{video.suffix}"
                    shutil.copyfile(video, path)
                    forget()
                    began = time.perf_counter()
                    counted[name] = group(path, self._setting, clues)
                    seconds[name].append(time.perf_counter() - began)
                    path.unlink()
                    said = f"{seconds[name][-1]:.2f} s, {counted[name]}"
                    print(f"{kind} clue, {name}: {said}", file=sys.stderr)
        return {
            "contenders": {
                name: {"seconds": own, "median": statistics.median(own), "counts": counted[name]}
                for name, own in seconds.items()
            },
            "comparisons": [
                {
                    "name": name,
                    "baseline": PEERS[peer].label,
                    "same_work": PEERS[peer].same_work(name),
                    "speedup": statistics.median(
                        theirs / ours
                        for theirs, ours in zip(
                            seconds[PEERS[peer].label], seconds[name], strict=True
                        )
                    ),
                }
                for peer in self._peers
                for name in self._strategies
            ],
        }

    def _alike(self, setting: Setting, strategy: StrategyName, clues: Any) -> dict[str, Any]:
        alike = asked_alike(self._runtime, setting, strategy, self._words)
        return {**alike, "clues": [[clue_from_json(clue) for clue in own] for own in clues]}

    def _loop(self, loop: GroupLoop) -> Group:
        def group(video: Path, setting: Setting, clues: Any) -> dict[str, int]:
            return loop.ask_group(video, QUESTIONS[0], **self._alike(setting, "official", clues))

        return group

    def _vllm(self, vllm: Any, name: str) -> Group:
        def group(video: Path, setting: Setting, clues: Any) -> dict[str, int]:
            alike = self._alike(setting, PEERS[name].strategy, clues)
            told = vllm.ask_group(video, QUESTIONS[0], metadata=self._metadata, **alike)
            rounds = [look for own in told for look in own]
            return {
                "files_opened": sum(bool(r["frames_decoded"]) for r in rounds),
                "frames_decoded": sum(r["frames_decoded"] for r in rounds),
                "pairs_encoded": vllm.pairs_encoded,  # with n it does not tell what it prefilled
            }

        return group

    def _ours(self, strategy: StrategyName) -> Group:
        def group(video: Path, setting: Setting, clues: Any) -> dict[str, int]:
            with self._runtime.open(str(video)) as opened:
                ask = Ask(
                    [opened],
                    QUESTIONS[0],
                    options=OPTIONS,
                    perception=setting.perception(strategy),
                    sampling=replace(setting.sampling, temperature=1.0, seed=SEED),
                )
                found = self._runtime.rollouts(ask, len(clues), assume_clues=clues)
            require("bench", "members", found.errors, not found.errors, "without errors")
            rounds = [look for answer in found.answers for look in answer.rounds]
            names = COUNTERS[1:]
            counts = {name: sum(getattr(r.reuse, name) for r in rounds) for name in names}
            return {"files_opened": 1, **counts}

        return group


class GroupLoop(PublishedLoop):
    """The published loop with several samples: rounds whose prompt is the same for all with
    `num_return_sequences`, others as one batch, padded on the left. Positions are those of the
    installed transformers."""

    def ask_group(
        self,
        video: Path,
        question: str,
        *,
        perception: Any,
        clues: Sequence[Sequence[Clue]],
        max_tokens: int,
        options: Sequence[str],
        templates: Any,
    ) -> dict[str, int]:
        """All rounds of a group, one member for each of `clues`; what it took."""
        self.model.model.get_rope_index = self._own_positions
        counts = dict.fromkeys(COUNTERS, 0)
        histories: list[list[RoundHistory]] = [[] for _ in clues]
        hook = self.model.model.visual.register_forward_pre_hook(
            lambda _, args, kwargs: counts.update(
                pairs_encoded=counts["pairs_encoded"] + int(kwargs["grid_thw"][:, 0].sum())
            ),
            with_kwargs=True,
        )
        try:
            for index in range(perception.max_rounds):
                distinct = [own[:index] for own in clues]
                same = all(own == distinct[0] for own in distinct)
                inputs = []
                for history in histories[:1] if same else histories:
                    with FileReader(video) as reader:
                        metadata = file_metadata(reader, "the video")
                        plan = plan_round("official", perception, [metadata], history, index)
                        prompt = build_prompt(
                            *(perception, CHAT, templates, plan, history),
                            question=question,
                            options=options,
                        )
                        (segment,) = plan.segments
                        frames = reader.frames(list(plan.frame_indices))
                    counts["files_opened"] += 1
                    counts["frames_decoded"] += len(frames)
                    text = CHAT.text(prompt)
                    inputs.append(self._inputs(text, segment, frames, fixed_point=True))
                    for member, own in enumerate(clues):
                        if (same or history is histories[member]) and index < len(own):
                            look = RoundHistory(plan, own[index], forced=True)
                            histories[member] = [*histories[member], look]
                batch, num = _left_padded(inputs), len(clues) if same else 1
                counts["tokens_prefilled"] += int(batch["attention_mask"].sum()) * num
                with torch.inference_mode():
                    self.model.generate(
                        **batch,
                        max_new_tokens=max_tokens,
                        do_sample=True,
                        temperature=1.0,
                        top_k=0,
                        num_return_sequences=num,
                    )
        finally:
            hook.remove()
        return counts


def _left_padded(inputs: list[dict[str, Any]]) -> dict[str, Any]:
    """One batch of several prompts with a video each."""
    longest = max(one["input_ids"].shape[1] for one in inputs)
    batch: dict[str, Any] = {}
    for name in inputs[0]:
        parts = [one[name] for one in inputs]
        if name in ("input_ids", "attention_mask", "mm_token_type_ids"):
            parts = [torch.nn.functional.pad(p, (longest - p.shape[1], 0)) for p in parts]
        batch[name] = torch.cat(parts)
    return batch


def print_table(result: dict[str, Any]) -> None:
    """Seconds and counts of every side, then ours against the peers."""
    for run in result["runs"]:
        print(f"{run['dtype']}, {run['clues']} clue")
        for name, own in run["contenders"].items():
            counts = ", ".join(f"{k} {v:,}" for k, v in own["counts"].items())
            print(f"  {name:20} {own['median']:7.2f} s  {counts}")
        for found in run["comparisons"]:
            print(f"  {found['name']} against the {found['baseline']}: {found['speedup']:.2f}")


if __name__ == "__main__":
    sys.exit(script(sys.modules[__name__]))
