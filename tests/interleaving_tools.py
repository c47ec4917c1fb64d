"""Random interleavings of everything an engine can be asked for."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from engine_tools import Frames, encode, look, make_engine, pair

from vtts_rt.engine.sequence import Completion, FailedEvent, FinishedEvent, GenerationRequest
from vtts_rt.models.tokenizer import EncodedPrompt, Tokenizer
from vtts_rt.types import SamplingParams, TimeLabel


class SlowFrames(Frames):
    """Frames that are not ready the first few times they are asked for."""

    def __init__(self, patience: int) -> None:
        super().__init__()
        self.patience = patience

    def ready(self, video: int, frame_indices: Sequence[int]) -> bool:
        self.patience -= 1
        return self.patience < 0


class Interleaving:
    """One engine, a random history of actions on it, and what each request came to."""

    def __init__(self, seed: int, model: Any, tokenizer: Tokenizer) -> None:
        self.rng, self.rng_of_settings = random.Random(seed), random.Random(seed)
        self.model, self.tokenizer = model, tokenizer
        self.weights = 0
        sequences = self.rng.choice((1, 2, 4, 8))
        self.engine = make_engine(
            model,
            tokenizer,
            num_pages=self.rng.choice((36, 60, 300)),
            max_sequences=sequences,
            max_batch_tokens=self.rng.choice((sequences + 1, 24, 2048)),
            max_wait_steps=self.rng.choice((3, 20, 256)),
            draft_tokens=self.rng.choice((0, 3, 15)),
            vision_cache_bytes=self.rng.choice((0, 500, 1 << 17)) * model.dtype.itemsize,
        )
        self.requests: dict[int, tuple[int, GenerationRequest]] = {}
        self.done: list[tuple[int, GenerationRequest, Completion]] = []
        self.pins: list[Any] = []

    def prompt(self) -> EncodedPrompt:
        """A text from a few beginnings, then up to three looks from a few pairs."""
        rng = self.rng
        parts: list[Any] = [rng.choice(("look ", "look at this ", "what is on the red card? "))]
        for _ in range(rng.randint(0, 3)):
            first = rng.randint(0, 5)
            pairs = [pair(first), pair(first + 1)][: rng.randint(1, 2)]
            parts += [TimeLabel(f"<{first}.0s>"), look(*pairs)]
        return encode(self.tokenizer, *parts, rng.choice((" say", " answer: ")))

    def settings(self) -> dict[str, Any]:
        """Nothing that changes logits, mostly; or one or two things that do."""
        rng = self.rng_of_settings
        if rng.random() < 0.6:
            return {}
        some = {
            "repetition_penalty": rng.choice((1.05, 1.5)),
            "frequency_penalty": 1.0,
            "presence_penalty": -1.0,
            "logit_bias": {rng.randrange(400): 20.0},
            "min_tokens": 5,
            "no_repeat_ngram_size": 2,
            "begin_suppress_tokens": range(0, 400, 2),
            "logprobs": "raw",
        }
        return {name: some[name] for name in rng.sample(list(some), 2)}

    def add(self, prompt: EncodedPrompt, earlier: Sequence[Sequence[int]] = ()) -> None:
        rng = self.rng
        sampling = SamplingParams(
            max_tokens=rng.randint(1, 12),
            temperature=rng.choice((0.0, 0.0, 1.0)),
            seed=rng.randint(0, 2),
            ignore_eos=rng.random() < 0.7,
            **self.settings(),
        )
        request = GenerationRequest(
            prompt,
            provider=SlowFrames(rng.choice((0, 0, 5, 40))),
            sampling=sampling,
            member=rng.randint(0, 1),
            earlier_answers=earlier,
        )
        self.requests[self.engine.add(request)] = self.weights, request

    def step(self) -> None:
        for event in self.engine.step():
            assert not isinstance(event, FailedEvent), event.error
            if isinstance(event, FinishedEvent):
                self.done.append((*self.requests.pop(event.request_id), event.completion))

    def abort(self, request_id: int) -> None:
        completion = self.engine.abort(request_id)
        assert completion is not None
        self.done.append((*self.requests.pop(request_id), completion))

    def branch(self) -> None:
        """The next round of something that has ended, aborted or not; or the same again, with
        drafts that are right."""
        _, request, completion = self.rng.choice(self.done)
        if self.rng.random() < 0.3:
            again = replace(request, earlier_answers=[completion.token_ids])
            self.requests[self.engine.add(again)] = self.weights, again
            return
        more = encode(self.tokenizer, " more ", look(pair(self.rng.randint(0, 7))), " say")
        prompt = request.prompt.extended(completion.token_ids) + more
        if len(prompt) < 120:
            self.add(prompt, [completion.token_ids])

    def update_weights(self) -> None:
        if self.requests:
            with pytest.raises(RuntimeError, match="in work"):
                self.engine.update_weights(lambda model: None)
        while self.requests and self.rng.random() < 0.9:  # drain, or abort what is left
            self.step()
        for request_id in list(self.requests):
            self.abort(request_id)
        self.weights = 1 - self.weights
        self.engine.update_weights(lambda model: flip(model, self.weights))

    def act(self) -> None:
        rng, engine = self.rng, self.engine
        action = rng.choices(
            ("add", "step", "abort", "evict", "preempt", "branch", "pin", "forget", "update"),
            (6, 24, 1, 2, 2, 4, 1, 1, 0.5),
        )[0]
        if action == "add":
            self.add(self.prompt())
        elif action == "step":
            self.step()
        elif action == "abort" and self.requests:
            self.abort(rng.choice(list(self.requests)))
        elif action == "evict":
            engine.prefix_tree.evict(rng.randint(1, 20))
        elif action == "preempt" and engine._scheduler.running:
            victim = rng.choice(engine._scheduler.running)
            engine._scheduler._preempt(victim, at_front=rng.random() < 0.5)
        elif action == "branch" and self.done:
            self.branch()
        elif action == "pin":
            if self.pins and rng.random() < 0.7:
                self.pins.pop().release()
            elif len(self.pins) < 2:
                keys = np.concatenate([s.keys for s in engine._sequences.values()] or [[]])
                if len(keys):
                    self.pins.append(engine.prefix_tree.pin(keys[:12]))
        elif action == "forget":
            engine.vision_cache.clear()
        elif action == "update":
            self.update_weights()

    def run(self) -> None:
        for _ in range(60):
            self.act()
            self.engine.check_integrity()
        for held in self.pins:
            held.release()
        steps = 0
        while self.requests:
            self.step()
            self.engine.check_integrity()
            assert (steps := steps + 1) < 5000, "a request waits for ever"


def flip(model: Any, weights: int) -> None:
    """Two sets of language weights, exactly: the sign of one matrix."""
    matrix = model.language.layers[0].mlp.down_proj.weight
    if (float(matrix.data.flatten()[0]) > 0) != (weights == 0):
        matrix.data.neg_()
