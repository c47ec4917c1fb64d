"""Transcripts: transformers, given one, finds the log-probs that the engine told."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from utils import LOOK, request, tiny_checkpoint, tiny_qwen2_5_vl, tiny_qwen2_vl, tiny_qwen3_vl

from vtts_rt import BadRequest, EngineConfig, PerceptionConfig, Runtime, SamplingParams
from vtts_rt.config import PARITIES, STRATEGIES, strategies_of
from vtts_rt.engine.sequence import Completion, GenerationRequest
from vtts_rt.models.tokenizer import EncodedPrompt
from vtts_rt.rounds.transcript import Transcript
from vtts_rt.types import ReuseStats, RoundTimings, StrategyName

RAW = SamplingParams(temperature=1.0, seed=3, max_tokens=6, ignore_eos=True, logprobs="raw")


@pytest.fixture(scope="module", params=[tiny_qwen2_5_vl, tiny_qwen2_vl, tiny_qwen3_vl])
def checkpoint(request: Any, tmp_path_factory: Any) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"), request.param)


@pytest.fixture(scope="module")
def runtime(checkpoint: Path, request: pytest.FixtureRequest) -> Iterator[Runtime]:
    """In float32, or the dtype that a test is parametrised with."""
    engine, dtype = EngineConfig(kv_bytes=1 << 26), getattr(request, "param", "float32")
    with Runtime.from_pretrained(checkpoint, dtype=dtype, engine=engine) as runtime:
        yield runtime


@pytest.fixture(scope="module")
def peer(checkpoint: Path) -> Any:
    import torchvision_shim

    torchvision_shim.install()
    from transformers import AutoModelForImageTextToText

    loaded = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32)
    return loaded.eval()


@torch.inference_mode()
def logprobs_of(peer: Any, runtime: Runtime, transcript: Transcript) -> np.ndarray:
    """Of the generated tokens, from ids, positions and the features of the vision cache."""
    engine, ids = runtime.engine, torch.from_numpy(transcript.token_ids)
    embeddings = peer.get_input_embeddings()(ids)
    shown, found = torch.zeros(len(ids), dtype=torch.bool), []
    for span in transcript.spans:
        keys = [engine._encoder.pair_key(span.segment, pair) for pair in span.segment.pairs]
        found += [engine.vision_cache.get(key) for key in keys]
        shown[span.start : span.start + span.length] = True
    embeddings[shown], *levels = torch.cat(found).split(embeddings.shape[1], dim=1)
    positions = torch.from_numpy(transcript.position_ids.copy())
    stacked = {"visual_pos_masks": shown[None], "deepstack_visual_embeds": levels} if levels else {}
    out = peer.model.language_model(
        inputs_embeds=embeddings[None], position_ids=positions[:, None], **stacked
    )
    logits = peer.lm_head(out.last_hidden_state)[0]
    told = torch.log_softmax(logits[:-1].double(), -1).gather(1, ids[1:, None])[:, 0]
    return told.numpy()[transcript.generated[1:]]


@pytest.mark.parametrize(
    ("dialect", "strategy"),
    [(dialect, name) for dialect in ("r1.5", "longvt") for name in strategies_of(dialect)],
)
def test_transformers_finds_the_log_probs(
    runtime: Runtime, peer: Any, clips: list[Path], dialect: str, strategy: StrategyName
) -> None:
    continues = STRATEGIES[strategy].continues
    for parity in PARITIES:
        config = PerceptionConfig(strategy=strategy, parity=parity, dialect=dialect, **LOOK)
        answer = runtime.ask(**request(clips[0], perception=config, sampling=RAW))
        assert len(answer.rounds) == 3
        said: list[int] = []
        for result in answer.rounds:
            transcript = result.transcript
            said = [*said, *result.token_ids] if continues else result.token_ids
            assert transcript.token_ids[transcript.generated].tolist() == said
            assert len(transcript.token_ids) == result.prompt_tokens + len(result.token_ids)
            assert all(s.length == s.segment.num_tokens for s in transcript.spans)
            told = transcript.logprobs[transcript.generated]
            assert told[-6:].tolist() == result.logprobs
            assert told == pytest.approx(logprobs_of(peer, runtime, transcript), abs=1e-4)
            assert np.isnan(transcript.logprobs[~transcript.generated]).all()


@pytest.mark.parametrize(("follows", "num_generated"), [(9, 3), (8, 2)])
def test_an_end_token_is_generated_where_the_turn_ends_with_it(
    follows: int, num_generated: int
) -> None:
    def said(prompt: EncodedPrompt, *token_ids: int) -> Completion:
        positions = np.arange(len(prompt) + len(token_ids))[None].repeat(3, 0)
        logprobs = [-float(i) for i in token_ids]
        spent = ReuseStats(), RoundTimings()
        return Completion([*token_ids], logprobs, "", "stop", len(prompt), *spent, 0, positions)

    def text(*token_ids: int) -> EncodedPrompt:
        return EncodedPrompt([*token_ids], (), np.zeros(len(token_ids), np.uint8))

    first = Transcript.of_round(text(1, 2), said(text(1, 2), 5, 6, 9), "release", None)
    assert first.generated.tolist() == [False, False, True, True, True]
    prompt = text(1, 2, 5, 6, follows, 3)
    second = Transcript.of_round(prompt, said(prompt, 7), "release", first)
    assert second.generated[:-1].sum() == num_generated and second.generated[-1]
    assert second.logprobs[2:4].tolist() == [-5.0, -6.0] and second.logprobs[-1] == -7.0
    assert np.isnan(second.logprobs[4]) == (follows != 9)


@pytest.mark.parametrize("runtime", ["float32", "bfloat16"], indirect=True)
@pytest.mark.parametrize("strategy", ["official", "append"])
def test_a_transcript_is_scored_by_the_current_weights(
    runtime: Runtime, clips: list[Path], strategy: str
) -> None:
    name = "model.language_model.norm.weight"
    norm = runtime.engine.model.export()[name]
    for parity in PARITIES:
        config = PerceptionConfig(strategy=strategy, parity=parity, **LOOK)  # type: ignore[arg-type]
        answer = runtime.ask(**request([*clips], perception=config, sampling=RAW))
        for result in answer.rounds:
            told = result.transcript.logprobs[result.transcript.generated]
            assert runtime.score(result.transcript) == told.tolist()
        # Nothing is cached: everything is decoded and encoded again.
        runtime.clear_caches()
        assert runtime.score(result.transcript, videos=clips) == told.tolist()
        runtime.update_weights({name: -norm})
        changed = runtime.score(result.transcript)
        assert len(changed) == len(told) and np.abs(np.array(changed) - told).max() > 0.1
        runtime.update_weights({name: norm})


def test_features_of_a_transcript(runtime: Runtime, clips: list[Path]) -> None:
    answer = runtime.ask(**request([*clips], sampling=RAW))
    transcript = answer.rounds[-1].transcript
    assert len(transcript.spans) > 4
    found = runtime.features(transcript)
    assert found.shape == (
        sum(s.length for s in transcript.spans),
        runtime.engine.model.feature_dim,
    )
    engine = runtime.engine
    expected = [
        engine.vision_cache.get(engine._encoder.pair_key(span.segment, pair))
        for span in transcript.spans
        for pair in span.segment.pairs
    ]
    assert torch.equal(found, torch.cat(expected))
    found.requires_grad_().square().sum().backward()  # part of a trainer's graph
    runtime.clear_caches()
    for function in (runtime.features, runtime.score):
        with pytest.raises(BadRequest, match="^Engine: videos must be given, as features"):
            function(transcript)
        with pytest.raises(BadRequest, match=f"^{function.__name__}: videos must be those of the"):
            function(transcript, videos=clips[::-1])
    with runtime.open(clips[0]) as video:
        torch.testing.assert_close(runtime.features(transcript, videos=[video, clips[1]]), found)
    text = runtime.chat([{"role": "user", "content": "hello"}], sampling=RAW)
    assert runtime.features(text.transcript).shape == (0, engine.model.feature_dim)
    assert runtime.score(text.transcript) == pytest.approx(text.logprobs, abs=1e-4)


def test_all_turns_are_scored_by_the_same_weights(
    runtime: Runtime, clips: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    transcript = runtime.ask(**request(clips[0], sampling=RAW)).rounds[-1].transcript
    assert len(list(transcript.turns())) > 1
    expected = runtime.score(transcript)
    name, engine = "model.language_model.norm.weight", runtime.engine
    norm, add = engine.model.export()[name], engine.add
    update = threading.Thread(target=runtime.update_weights, args=({name: -norm},))

    def add_before_an_update(request: GenerationRequest) -> int:
        if update.ident is None:
            update.start()
            while runtime._driver._calls.empty():
                time.sleep(0.001)
        return add(request)

    monkeypatch.setattr(engine, "add", add_before_an_update)
    try:
        assert runtime.score(transcript) == pytest.approx(expected, abs=1e-4)
        update.join()
        assert runtime.score(transcript) != pytest.approx(expected, abs=0.1)
    finally:
        runtime.update_weights({name: norm})


def test_features_of_a_transcript_as_long_as_the_budget(checkpoint: Path, clip: Path) -> None:
    one = {"assume_clues": None, "perception": PerceptionConfig(max_rounds=1, **LOOK)}
    with Runtime.from_pretrained(checkpoint, dtype="float32", device="cpu") as runtime:
        prompt_tokens = runtime.plan(**request(clip, **one))["rounds"][0]["prompt_tokens"]
        pool = runtime.engine.pool
        kv_bytes = (pool.pages_for(prompt_tokens) + 1) * pool.page_bytes
    engine, sampling = EngineConfig(kv_bytes=kv_bytes), SamplingParams(ignore_eos=True)
    with Runtime.from_pretrained(
        checkpoint, dtype="float32", device="cpu", engine=engine
    ) as runtime:
        answer = runtime.ask(**request(clip, **one, sampling=sampling))
        transcript = answer.rounds[0].transcript
        assert len(transcript.token_ids) == runtime.engine.token_budget
        assert len(runtime.features(transcript)) == sum(s.length for s in transcript.spans)
        assert len(runtime.score(transcript)) == len(answer.rounds[0].token_ids)
