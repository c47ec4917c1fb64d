"""Peers on vLLM, in an environment of their own: the published loop, and our `append` layout.

`bench/vllm_env.sh` makes the environment. A worker process (vllm_worker.py) holds the
engine; what both sides say is a JSON object a line. Frames, words and sizes are those of our
plans, made here; the worker opens and decodes the file in every round, and resizes as the release
does. vLLM's positions are the release's too (parity "release").
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from vtts_rt.bench import frames
from vtts_rt.bench.peer import RoundSample
from vtts_rt.config import ResolvedPerception
from vtts_rt.models.checkpoint import read_eos_token_ids
from vtts_rt.models.qwen2_5_vl.chat import CHAT
from vtts_rt.perception.clue import Clue
from vtts_rt.perception.plan import FramePlan, RoundHistory
from vtts_rt.perception.prompts import PromptTemplates
from vtts_rt.perception.strategy import build_prompt, find_strategy, plan_round
from vtts_rt.types import ReuseStats, RoundTimings, VideoMetadata

# What makes vLLM's environment.
ENVIRONMENT = (
    "vLLM runs in an environment of its own: sh bench/vllm_env.sh DIR, then --vllm-python "
    "DIR/bin/python"
)
WORKER = Path(__file__).with_name("vllm_worker.py")
FRAMES = Path(frames.__file__)  # which the worker loads as a file
# Run as a file that is not in sys.path[0]: modules beside it would hide others.
_RUN = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='__main__')"
_SHARED: dict[str, Any] = {
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "processor_class": "Qwen2_5_VLProcessor",
}
# What vLLM needs beside a checkpoint's weights and tokenizer, where the folder lacks it.
PROCESSOR_FILES: dict[str, dict[str, Any]] = {
    "preprocessor_config.json": {
        **_SHARED,
        "image_processor_type": "Qwen2VLImageProcessor",
        "min_pixels": 56 * 56,
        "max_pixels": 28 * 28 * 16384,
    },
    "video_preprocessor_config.json": {
        **_SHARED,
        "video_processor_type": "Qwen2VLVideoProcessor",
        "size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 16384},
    },
}


class VllmPeer:
    """A vLLM engine in a process of its own; a context manager.

    model: checkpoint folder. python: interpreter of vLLM's environment. compiled: torch.compile
    instead of eager mode: measured, eager is as fast here and starts in a tenth of the time.
    RuntimeError with the last lines of its log if the worker fails, or if that vLLM is not built
    for `device`.
    """

    def __init__(
        self,
        model: Path,
        python: str | Path,
        *,
        dtype: str = "float32",
        device: str = "cpu",
        threads: int = 2,
        compiled: bool = False,
        max_model_len: int = 16384,
        max_videos: int = 128,
        kv_gib: int = 2,
    ) -> None:
        python = Path(python).absolute()  # the worker runs in another folder
        self._folder = tempfile.TemporaryDirectory(prefix="vtts_rt-vllm-")
        folder = Path(self._folder.name)
        self._eos_token_ids = sorted(read_eos_token_ids(model))
        self._log = folder / "log"
        self._process: subprocess.Popen[str] | None = None
        try:
            with self._log.open("w") as log:
                self._process = subprocess.Popen(
                    [str(python), "-c", _RUN, str(WORKER), str(FRAMES)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    cwd=folder,
                    env=_environment(python, threads, kv_gib),
                )
            loaded = self._call(
                "load",
                model=str(_with_processor(model, folder / "model")),
                dtype=dtype,
                compiled=compiled,
                max_model_len=max_model_len,
                max_videos=max_videos,
            )
            self.about: dict[str, Any] = {**loaded["about"], "kv_cache_gib": kv_gib}
            self.require_device(device)
        except BaseException:
            self.close()
            raise

    def require_device(self, device: str) -> None:
        """RuntimeError if this vLLM runs elsewhere, which its build decides."""
        if self.about["device"] != device:
            raise RuntimeError(
                f"bench: the vLLM of --vllm-python runs on {self.about['device']}, not on "
                f"{device}; use --device {self.about['device']} or another environment"
            )

    def ask(
        self,
        video: str | Path,
        question: str,
        *,
        metadata: VideoMetadata,
        perception: ResolvedPerception,
        clues: Sequence[Clue],
        max_tokens: int,
        options: Sequence[str] = (),
        templates: PromptTemplates | None = None,
    ) -> list[RoundSample]:
        """All rounds of a question; `clues` replace what the model says after each round.

        metadata: of the file, as our source tells it. perception.strategy: where it continues,
        every round goes behind the ones before; otherwise each is asked afresh.
        """
        (rounds,) = self.ask_together(
            [video],
            [question],
            metadata=metadata,
            perception=perception,
            clues=clues,
            max_tokens=max_tokens,
            options=options,
            templates=templates,
        )
        return rounds

    def ask_together(
        self,
        videos: Sequence[str | Path],
        questions: Sequence[str],
        *,
        metadata: VideoMetadata,
        perception: ResolvedPerception,
        clues: Sequence[Clue],
        max_tokens: int,
        options: Sequence[str] = (),
        templates: PromptTemplates | None = None,
    ) -> list[list[RoundSample]]:
        """As `ask`: a question about each video, all put at once. metadata: of every video.

        Of a round, pairs encoded and the time of the vision tower are those of all questions
        meanwhile; `pairs_encoded` counts them once.
        """
        strategy = find_strategy(perception.strategy)
        words = templates or PromptTemplates()
        scripts = [
            _script(metadata, question, perception, clues, options, words) for question in questions
        ]
        reply = self._call(
            "ask",
            questions=[
                {
                    "video": str(video),
                    "rounds": [
                        {"text": text, "items": _items(plan)}
                        for plan, text in zip(plans, texts, strict=True)
                    ],
                }
                for video, (plans, texts) in zip(videos, scripts, strict=True)
            ],
            max_tokens=max_tokens,
            append=strategy.continues,
            eos_token_ids=self._eos_token_ids,
        )
        self.pairs_encoded = reply["pairs_encoded"]
        return [
            _samples(plans, done, strategy.continues)
            for (plans, _), done in zip(scripts, reply["answers"], strict=True)
        ]

    def ask_group(
        self,
        video: str | Path,
        question: str,
        *,
        metadata: VideoMetadata,
        perception: ResolvedPerception,
        clues: Sequence[Sequence[Clue]],
        max_tokens: int,
        options: Sequence[str] = (),
        templates: PromptTemplates | None = None,
    ) -> list[list[dict[str, Any]]]:
        """The rounds of a group as the worker tells them, one member for each of `clues`: prompts
        that are the same for all go in once, with n. `pairs_encoded` is of the whole group."""
        words, append = templates or PromptTemplates(), find_strategy(perception.strategy).continues
        scripts = [_script(metadata, question, perception, c, options, words) for c in clues]
        rounds = [
            [{"text": t, "items": _items(p)} for p, t in zip(*script, strict=True)]
            for script in scripts
        ]
        same = not append and all(own == rounds[0] for own in rounds)
        num_shared = len(rounds[0]) if same else 1
        reply = self._call(
            "ask_group",
            video=str(video),
            first=rounds[0][:num_shared],
            members=[own[num_shared:] for own in rounds],
            num_answers=len(rounds),
            max_tokens=max_tokens,
            append=append,
            eos_token_ids=self._eos_token_ids,
        )
        self.pairs_encoded = reply["pairs_encoded"]
        answers: list[list[dict[str, Any]]] = reply["answers"]
        return answers

    def forget(self) -> None:
        """Clear every cache of the engine: the next question is a cold one."""
        self._call("forget")

    def _call(self, operation: str, **arguments: Any) -> dict[str, Any]:
        assert self._process is not None
        reads, writes = self._process.stdout, self._process.stdin
        assert reads is not None and writes is not None
        try:
            writes.write(json.dumps({"op": operation, **arguments}) + "\n")
            writes.flush()
            line = reads.readline()
        except BrokenPipeError:
            line = ""
        reply: dict[str, Any] = json.loads(line) if line else {"error": "the worker ended"}
        if "error" in reply:
            tail = self._log.read_text(errors="replace")[-2000:]
            raise RuntimeError(
                f"bench: vLLM's worker failed in {operation}: {reply['error']}; {ENVIRONMENT}\n"
                f"{tail}"
            )
        return reply

    def close(self) -> None:
        """End the worker."""
        if self._process is not None:
            pipes: list[IO[str] | None] = [self._process.stdin, self._process.stdout]
            for pipe in pipes:
                if pipe is not None:
                    pipe.close()
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
        self._folder.cleanup()

    def __enter__(self) -> VllmPeer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _samples(
    plans: Sequence[FramePlan], answer: Sequence[dict[str, Any]], continues: bool
) -> list[RoundSample]:
    """The rounds of a question as the worker told them."""
    shown = 0
    samples = []
    for plan, done in zip(plans, answer, strict=True):
        # Only an appended conversation holds the pairs of earlier rounds.
        shown = plan.num_pairs + (shown if continues else 0)
        cached = done["cached_tokens"]
        reuse = ReuseStats(
            frames_decoded=done["frames_decoded"],
            frames_codec_decoded=done["frames_codec_decoded"],
            pairs_encoded=done["pairs_encoded"],
            pairs_reused=max(0, shown - done["pairs_encoded"]),
            tokens_prefilled=done["prompt_tokens"] - cached,
            tokens_reused=cached,
        )
        samples.append(
            RoundSample(
                done["token_ids"],
                list(plan.frame_indices),
                [segment.resized_hw for segment in plan.segments],
                done["prompt_tokens"],
                RoundTimings(**done["timings_ms"]),
                reuse,
            )
        )
    return samples


def _script(
    metadata: VideoMetadata,
    question: str,
    perception: ResolvedPerception,
    clues: Sequence[Clue],
    options: Sequence[str],
    templates: PromptTemplates,
) -> tuple[list[FramePlan], list[str]]:
    """Plan and text of every round; the clues are given, so nothing waits for an answer."""
    history: list[RoundHistory] = []
    plans, texts = [], []
    for index in range(perception.max_rounds):
        plan = plan_round(perception.strategy, perception, [metadata], history, index)
        prompt = build_prompt(
            perception, CHAT, templates, plan, history, question=question, options=options
        )
        plans.append(plan)
        texts.append(CHAT.text(prompt))
        if index < len(clues):
            history.append(RoundHistory(plan, clues[index], forced=True))
    return plans, texts


def _items(plan: FramePlan) -> list[dict[str, Any]]:
    """The video items of a round, one a segment."""
    frames = [segment.frame_indices for segment in plan.segments]
    if len(frames) == 1:  # an odd number of frames is passed as sampled
        frames = [plan.frame_indices]
    return [
        {
            "frame_indices": list(indices),
            "box": list(segment.box),
            "resized_hw": list(segment.resized_hw),
            "seconds_per_grid": segment.seconds_per_grid,
        }
        for indices, segment in zip(frames, plan.segments, strict=True)
    ]


def _with_processor(model: Path, view: Path) -> Path:
    """A folder that shows a checkpoint's files and the processor's, which it may lack."""
    view.mkdir()
    for path in model.iterdir():
        (view / path.name).symlink_to(path.resolve())
    for name, content in PROCESSOR_FILES.items():
        if not (view / name).exists():
            (view / name).write_text(json.dumps(content))
    return view


def _environment(python: Path, threads: int, kv_gib: int) -> dict[str, str]:
    """Variables of the worker: the settings that vLLM's guide for CPUs recommends."""
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV"))}
    # Intel's OpenMP, which the CPU build brings along but does not load by itself: with GNU's a
    # question takes three times as long. tcmalloc is not in the package.
    iomp = python.absolute().parent.parent / "lib" / "libiomp5.so"
    preload = {"LD_PRELOAD": str(iomp)} if iomp.is_file() else {}
    return {
        **keep,
        **preload,
        "OMP_NUM_THREADS": str(threads),
        "KMP_BLOCKTIME": "5",  # as vLLM sets them for its own worker processes
        "KMP_TPAUSE": "0",
        # The engine in the worker itself: no hop between processes, and its tower can be timed.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": str(kv_gib),
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "HF_HUB_OFFLINE": "1",
    }
