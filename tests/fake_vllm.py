"""A stand-in for the module `vllm`: as much of its interface as the bench's worker uses.

It expands video items, caches prefixes in blocks of 16 tokens and vision outputs by content, and
"generates" tokens that say how long the prompt was. Copied as `vllm.py` to where a worker's
interpreter finds it.
"""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

__version__ = "0.0.fake"
BLOCK = 16


class SamplingParams:
    def __init__(self, *, temperature: float, max_tokens: int, ignore_eos: bool, n: int) -> None:
        assert temperature in (0.0, 1.0) and (n == 1 or temperature) and ignore_eos
        self.max_tokens, self.n = max_tokens, n


class _Visual(torch.nn.Module):
    def forward(self, pixels: torch.Tensor, grid_thw: list[tuple[int, int, int]]) -> torch.Tensor:
        return pixels


class LLM:
    def __init__(self, **options: Any) -> None:
        from transformers import AutoTokenizer

        folder = Path(options["model"])
        assert (folder / "video_preprocessor_config.json").is_file()
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._pad = self._tokenizer.convert_tokens_to_ids("<|video_pad|>")
        self._model = torch.nn.ModuleDict({"visual": _Visual()})
        self._model.visual = self._model["visual"]
        self._prefixes: list[list[Any]] = []
        self._encoded: set[int] = set()
        self._queue: list[Any] = []
        self._added = 0
        print("vLLM talks to stdout")
        self.llm_engine = SimpleNamespace(
            reset_encoder_cache=self._encoded.clear,
            step=self._step,
            abort_request=self._abort,
            vllm_config=SimpleNamespace(
                device_config=SimpleNamespace(device_type="cpu"),
                model_config=SimpleNamespace(enforce_eager=options["enforce_eager"]),
                cache_config=SimpleNamespace(enable_prefix_caching=True, block_size=BLOCK),
                scheduler_config=SimpleNamespace(max_num_batched_tokens=4096),
            ),
        )

    def get_tokenizer(self) -> Any:
        return self._tokenizer

    def apply_model(self, function: Any) -> list[Any]:
        return [function(self._model)]

    def reset_mm_cache(self) -> None:
        pass

    def reset_prefix_cache(self) -> bool:
        self._prefixes.clear()
        return True

    def enqueue(self, prompts: list[Any], params: SamplingParams, *, use_tqdm: bool) -> list[str]:
        if params.max_tokens > 100:
            raise ValueError("too many tokens for a fake")
        (prompt,) = prompts
        self._added += 1
        self._queue.append((str(self._added), prompt, params.max_tokens, params.n))
        return [f"{self._added}-{hash(self):x}"]

    def _abort(self, request_ids: list[str]) -> None:
        self._queue = [request for request in self._queue if request[0] not in request_ids]

    def _step(self) -> list[Any]:
        """The youngest request ends; the others are still running."""
        *self._queue, (request_id, prompt, max_tokens, n) = self._queue
        unfinished = [
            SimpleNamespace(request_id=r[0], finished=False, outputs=[]) for r in self._queue
        ]
        items = iter(prompt["multi_modal_data"]["video"])
        tokens: list[Any] = []
        for token in prompt["prompt_token_ids"]:
            tokens += self._item(*next(items)) if token == self._pad else [token]
        assert next(items, None) is None, "every item has its pad"
        cached = max((_common(tokens, prefix) for prefix in self._prefixes), default=0)
        self._prefixes.append(tokens)
        said = [
            SimpleNamespace(
                index=index,
                token_ids=[(len(tokens) + number + index) % 100 for number in range(max_tokens)],
                finish_reason="length",
            )
            for index in range(n)
        ]
        # Samples of one request may be told apart.
        early = SimpleNamespace(request_id=request_id, finished=False, outputs=said[1:])
        now = time.monotonic()
        return [
            *unfinished,
            early,
            SimpleNamespace(
                request_id=request_id,
                finished=True,
                prompt_token_ids=tokens,
                num_cached_tokens=min(cached, len(tokens) - 1) // BLOCK * BLOCK,
                outputs=said[:1],
                metrics=SimpleNamespace(first_token_ts=now, last_token_ts=now),
            ),
        ]

    def _item(self, frames: Any, metadata: dict[str, Any]) -> list[Any]:
        """The tokens of a video item, which the tower sees only once."""
        num, height, width, channels = frames.shape
        assert channels == 3 and height % 28 == width % 28 == 0
        assert metadata["frames_indices"] == list(range(num))
        pairs, content = (num + 1) // 2, hash((frames.tobytes(), metadata["fps"]))
        if content not in self._encoded:
            self._encoded.add(content)
            grid = (pairs, height // 14, width // 14)
            self._model.visual(torch.zeros(1), grid_thw=[grid])
        return [(content, number) for number in range(pairs * height * width // 784)]


def _common(a: list[Any], b: list[Any]) -> int:
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))
