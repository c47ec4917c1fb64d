"""Runs inside vLLM's own environment: questions in rounds, one JSON object a line.

Imports nothing of this project; `frames.py`, the argument, is loaded as a file. stdin:
{"op": "load", ...} once, then {"op": "ask", ...} and {"op": "forget"}, until it closes. stdout:
one object for each, {"error": text} for one that failed. Whatever vLLM prints goes to stderr.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any


class Peer:
    """vLLM's offline engine in this process, asked the way the published loop asks.

    model: folder of a checkpoint with its processor's files. dtype: vLLM's name. compiled:
    torch.compile instead of eager. max_model_len: tokens. max_videos: video items of a prompt.
    """

    def __init__(
        self, *, model: str, dtype: str, compiled: bool, max_model_len: int, max_videos: int
    ) -> None:
        self._vllm: Any = importlib.import_module("vllm")
        spec = importlib.util.spec_from_file_location("frames", sys.argv[2])
        assert spec is not None and spec.loader is not None
        self._frames = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self._frames)
        self._llm: Any = self._vllm.LLM(
            model=model,
            dtype=dtype,
            enforce_eager=not compiled,
            max_model_len=max_model_len,
            limit_mm_per_prompt={"image": 0, "video": max_videos},
            # Frames come resized, as qwen-vl-utils hands them over.
            mm_processor_kwargs={"do_resize": False},
            disable_log_stats=False,  # it keeps the time of the first token
            seed=0,
        )
        self._tokenizer: Any = self._llm.get_tokenizer()
        self._vision_seconds = 0.0
        self.pairs = 0  # that the tower has encoded
        self._llm.apply_model(self._watch)

    def _watch(self, model: Any) -> None:
        """Count pairs and seconds of the vision tower; the engine runs in this process."""

        def began(_module: Any, _inputs: Any) -> None:
            self._vision_began = time.perf_counter()

        def ended(_module: Any, _inputs: Any, kwargs: dict[str, Any], _out: Any) -> None:
            self._vision_seconds += time.perf_counter() - self._vision_began
            self.pairs += sum(int(grid[0]) for grid in kwargs["grid_thw"])

        model.visual.register_forward_pre_hook(began)
        model.visual.register_forward_hook(ended, with_kwargs=True)

    def about(self) -> dict[str, Any]:
        """What ran, for the result file."""
        import torch
        import transformers

        config = self._llm.llm_engine.vllm_config
        return {
            "vllm": self._vllm.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": sys.version.split()[0],
            "device": config.device_config.device_type,
            "compiled": not config.model_config.enforce_eager,
            "threads": torch.get_num_threads(),
            "ld_preload": [Path(p).name for p in os.environ.get("LD_PRELOAD", "").split(":") if p],
            "enable_prefix_caching": config.cache_config.enable_prefix_caching,
            "block_size": config.cache_config.block_size,
            "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
        }

    def forget(self) -> None:
        """Make the next question a cold one: KV, encoder outputs and processed inputs go."""
        self._llm.reset_mm_cache()
        self._llm.llm_engine.reset_encoder_cache()
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not reset its prefix cache")

    def ask(
        self,
        *,
        questions: list[dict[str, Any]],
        max_tokens: int,
        append: bool,
        eos_token_ids: list[int],
    ) -> list[list[dict[str, Any]]]:
        """All rounds of several questions, all put at once; greedy.

        questions: {"video": file, "rounds": [{"text": with one `<|video_pad|>` an item, "items":
        [{"frame_indices", "box", "resized_hw", "seconds_per_grid"}]}]}. append: a round's text and
        items go after those of the rounds before and what was generated; otherwise every round is
        a prompt of its own. Frames are decoded beside the engine, a file on each of its threads.
        Pairs and seconds of the vision tower are those of all questions during a round.
        """
        asked = [_Asked(found["video"], found["rounds"]) for found in questions]
        self._run(asked, {"max_tokens": max_tokens, "temperature": 0.0}, append, eos_token_ids)
        return [one.results for one in asked]

    def ask_group(
        self,
        *,
        video: str,
        first: list[dict[str, Any]],
        members: list[list[dict[str, Any]]],
        num_answers: int,
        max_tokens: int,
        append: bool,
        eos_token_ids: list[int],
    ) -> list[list[dict[str, Any]]]:
        """`num_answers` samples at temperature 1 of the rounds `first`, each one prompt with n,
        then of every member's own rounds; frames that several look at are decoded once. The rounds
        of `first`, and those of each member behind them."""
        trunk = _Asked(video, first, num_answers)
        trunk.forks = [_Asked(video, rounds) for rounds in members]
        sampling = {"max_tokens": max_tokens, "temperature": 1.0}
        self._run([trunk], sampling, append, eos_token_ids)
        return [trunk.results, *(fork.results for fork in trunk.forks)]

    def _run(
        self,
        asked: list[_Asked],
        sampling: dict[str, Any],
        append: bool,
        eos_token_ids: list[int],
    ) -> None:
        """All rounds of questions, and of what forks from them."""
        import torch

        running: dict[str, _Asked] = {}
        self._prepared: dict[str, Future[list[Any]]] = {}
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            try:
                waiting = {pool.submit(self._prepare, one.begin(append)): one for one in asked}
                while waiting or running:
                    for future in wait(waiting, 0 if running else None, FIRST_COMPLETED).done:
                        one = waiting.pop(future)
                        future.result()
                        running[self._enqueue(one, sampling)] = one
                    for output in self._llm.llm_engine.step() if running else ():
                        one = running[output.request_id]
                        # Of several samples each may be told as it ends.
                        done = (said for said in output.outputs if said.finish_reason is not None)
                        one.said |= {said.index: list(said.token_ids) for said in done}
                        if not output.finished:
                            continue
                        del running[output.request_id]
                        for more in self._finish(one, output, eos_token_ids):
                            waiting[pool.submit(self._prepare, more.begin(append))] = more
            finally:
                if running:
                    self._llm.llm_engine.abort_request(list(running))

    def _prepare(self, one: _Asked) -> None:
        """Decode and resize the frames of a round."""
        items = one.look["items"]
        mine: Future[list[Any]] = Future()
        found = self._prepared.setdefault(json.dumps([one.video, items]), mine)
        one.frames_decoded = one.frames_codec_decoded = 0
        if found is not mine:
            one.items += found.result()
            one.decoded = time.perf_counter()
            return
        try:
            indices = [index for item in items for index in item["frame_indices"]]
            with self._frames.FileReader(one.video) as reader:
                frames = reader.frames(indices) if indices else []
            one.frames_decoded = len(set(indices))
            one.frames_codec_decoded = reader.frames_codec_decoded
            one.decoded = time.perf_counter()
            mine.set_result(self._videos(items, frames))
        except BaseException as error:
            mine.set_exception(error)
            raise
        one.items += mine.result()

    def _enqueue(self, one: _Asked, sampling: dict[str, Any]) -> str:
        """Process the inputs of a round and put it into the queue; its id in outputs."""
        one.vision, one.pairs = self._vision_seconds, self.pairs
        one.token_ids += self._tokenizer.encode(one.look["text"], add_special_tokens=False)
        prompt: dict[str, Any] = {"prompt_token_ids": list(one.token_ids)}
        if one.items:
            prompt["multi_modal_data"] = {"video": list(one.items)}
        one.said = {}
        params = self._vllm.SamplingParams(ignore_eos=True, n=one.num_answers, **sampling)
        (request_id,) = self._llm.enqueue([prompt], params, use_tqdm=False)
        one.prepared = time.perf_counter()
        return str(request_id).partition("-")[0]  # without the engine's suffix

    def _finish(self, one: _Asked, output: Any, eos_token_ids: list[int]) -> list[_Asked]:
        """Note a round that has ended; what goes on behind it."""
        ended = time.perf_counter()
        generate = output.metrics.last_token_ts - output.metrics.first_token_ts
        before = list(one.token_ids)
        for index, fork in enumerate([one, *one.forks]):
            generated = one.said[max(index - 1, 0)]
            kept = generated[:-1] if generated[-1] in eos_token_ids else generated
            fork.token_ids, fork.items = before + kept, list(one.items)
        generated = one.said[0]
        vision = self._vision_seconds - one.vision
        seconds = {
            "decode": one.decoded - one.began,
            "preprocess": one.prepared - one.decoded,
            "vision": vision,
            "prefill": ended - one.prepared - vision - generate,
            "generate": generate,
            "total": ended - one.began,
            "ttft": ended - one.began - generate,
        }
        one.results.append(
            {
                "token_ids": generated,
                "prompt_tokens": len(output.prompt_token_ids),
                "cached_tokens": output.num_cached_tokens or 0,
                "frames_decoded": one.frames_decoded,
                "frames_codec_decoded": one.frames_codec_decoded,
                "pairs_encoded": self.pairs - one.pairs,
                "timings_ms": {phase: 1e3 * value for phase, value in seconds.items()},
            }
        )
        return [one] if one.rounds else [fork for fork in one.forks if fork.rounds]

    def _videos(self, items: list[dict[str, Any]], frames: Any) -> list[Any]:
        """(frames, metadata) of each item; `frames` hold those of all items one after another."""
        videos = []
        done = 0
        for item in items:
            num = len(item["frame_indices"])
            left, top, right, bottom = item["box"]
            cut = frames[done : done + num, top:bottom, left:right]
            done += num
            pixels = self._frames.resized(cut, item["resized_hw"])
            # The processor gives M-RoPE 2 / sampled rate, which is the rate of these numbers.
            rate = 2.0 / item["seconds_per_grid"]
            metadata = {
                "fps": rate,
                "duration": num / rate,
                "total_num_frames": num,
                "frames_indices": list(range(num)),
                "video_backend": "pyav",
                "do_sample_frames": False,
            }
            videos.append((pixels.permute(0, 2, 3, 1).contiguous().numpy(), metadata))
        return videos


class _Asked:
    """A question in work: rounds still to run, tokens and items so far, and times (s).

    num_answers: samples of each of its rounds. forks: what goes on behind its last round, one a
    sample. said: tokens of a round's samples that have ended.
    """

    def __init__(self, video: str, rounds: list[dict[str, Any]], num_answers: int = 1) -> None:
        self.video, self.rounds, self.num_answers = video, list(rounds), num_answers
        self.forks: list[_Asked] = []
        self.said: dict[int, list[int]] = {}
        self.token_ids: list[int] = []
        self.items: list[Any] = []
        self.results: list[dict[str, Any]] = []
        self.began = self.decoded = self.prepared = self.vision = 0.0
        self.pairs = self.frames_decoded = self.frames_codec_decoded = 0

    def begin(self, append: bool) -> _Asked:
        """Go to the next round."""
        self.look = self.rounds.pop(0)
        self.began = time.perf_counter()
        if not append:
            self.token_ids, self.items = [], []
        return self


def main() -> None:
    """Serve the lines of stdin."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    peer: Peer | None = None
    for line in sys.stdin:
        message = json.loads(line)
        operation = message.pop("op")
        reply: dict[str, Any] = {}
        try:
            if operation == "load":
                peer = Peer(**message)
                reply = {"about": peer.about()}
            elif peer is None:
                raise RuntimeError("load comes first")
            elif operation in ("ask", "ask_group"):
                pairs = peer.pairs
                answers = getattr(peer, operation)(**message)
                reply = {"answers": answers, "pairs_encoded": peer.pairs - pairs}
            elif operation == "forget":
                peer.forget()
            else:
                raise ValueError(f"unknown op {operation!r}")
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


if __name__ == "__main__":
    main()
