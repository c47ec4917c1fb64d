"""Decoding as graphs, and ahead of what the engine has seen: nothing that is generated, cached or
counted may tell it from decoding step by step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from engine_tools import Frames, encode, look, make_engine, pair, run, run_all, score
from graph_tools import FakeCapture, give_graphs, with_stand_ins
from interleaving_tools import Interleaving, flip
from utils import seeds

from vtts_rt.config import EngineConfig
from vtts_rt.engine import graphs
from vtts_rt.engine.decode_step import Shape
from vtts_rt.engine.engine import Engine
from vtts_rt.engine.sequence import FinishedEvent, GenerationRequest, TokenEvent
from vtts_rt.models.tokenizer import Tokenizer
from vtts_rt.types import SamplingParams

SEEN: Counter[str] = Counter()
LONG = SamplingParams(max_tokens=24, ignore_eos=True)


@pytest.fixture(autouse=True)
def stand_ins() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        with_stand_ins(patch)
        yield


@pytest.fixture(scope="module")
def model(model: Any) -> Any:
    """In float64: cascades, which only graphs have here, sum in another order."""
    return model.double()


class Graphed(Interleaving):
    def __init__(self, seed: int, model: Any, tokenizer: Tokenizer, runs_ahead: bool) -> None:
        super().__init__(seed, model, tokenizer)
        give_graphs(self.engine).runs_ahead = runs_ahead

    def results(self) -> tuple[list[Any], list[float]]:
        """What every request came to; all log-probabilities."""
        ends = [c for _, _, c in self.done]
        told = [(c.token_ids, c.text, c.finish_reason, c.reuse) for c in ends]
        return told, [logprob for c in ends for logprob in c.logprobs]

    def contents(self) -> tuple[list[Any], torch.Tensor]:
        """Keys of the prefix tree, in order, and the KV that it claims of their pages."""
        keys: list[Any] = []
        kv = []
        nodes = [self.engine.prefix_tree._root]
        while nodes:
            node = nodes.pop()
            keys.append(node.keys)
            claimed = self.engine.pool.pages[:, :, node.page, : len(node.keys) // 32]
            kv.append(claimed.flatten())
            nodes += node.children
        return keys, torch.cat([torch.empty(0, dtype=torch.float64), *kv])


@pytest.mark.parametrize("seed", seeds(10, 200))
def test_running_ahead_changes_nothing(model: Any, tokenizer: Tokenizer, seed: int) -> None:
    """Requests, aborts, preemptions, evictions, drafts, weights, in any order."""
    ways = []
    for runs_ahead in (True, False):
        flip(model, 0)
        ways.append(Graphed(seed, model, tokenizer, runs_ahead))
        ways[-1].run()
    ahead, behind = ways
    (told, logprobs), (expected, right) = (way.results() for way in ways)
    assert told == expected
    assert logprobs == pytest.approx(right, abs=1e-6)
    (keys, kv), (right_keys, right_kv) = (way.contents() for way in ways)
    assert keys == right_keys
    torch.testing.assert_close(kv, right_kv, rtol=0, atol=1e-9)
    stats, expected = (way.engine.stats() for way in ways)
    assert stats["passes"]["graphs"] == "on"
    for part in ("scheduler", "vision_cache", "prefix_tree"):
        assert stats[part] == expected[part]
    assert stats["kv"]["pages_free"] == expected["kv"]["pages_free"]
    counts = stats["passes"]
    SEEN.update(
        {**counts["eager_steps"], **{k: v for k, v in counts.items() if isinstance(v, int)}}
    )
    SEEN["interleavings"] += 1
    SEEN["cascades"] += sum(shape.num_shared > 0 for shape in graphs_of(ahead.engine))
    SEEN["replays not ahead"] += expected["passes"]["graph_replays"]


def graphs_of(engine: Engine) -> list[Shape]:
    graphs = engine._passes._graphs
    assert graphs is not None
    return list(graphs._graphs)


def test_the_interleavings_met_what_they_are_for() -> None:
    if not SEEN:
        pytest.skip("run with the interleavings")
    for what in ("steps_ahead", "wasted_rows", "drafts", "prefill", "replays not ahead"):
        assert SEEN[what] > SEEN["interleavings"], SEEN
    assert SEEN["cascades"] > SEEN["interleavings"] // 8


@pytest.mark.parametrize("num_requests", [1, 3, 9])
def test_graphs_say_what_single_steps_say(
    model: Any, tokenizer: Tokenizer, num_requests: int
) -> None:
    """Greedy and sampled rows, in buckets with padding, over borders of pages."""
    requests = [
        GenerationRequest(
            encode(tokenizer, f"number {index} ", look(pair(index)), " say"),
            provider=Frames(),
            sampling=SamplingParams(
                temperature=index % 3 / 2,
                top_k=(index % 2) * 20,
                top_p=(1.0, 0.9)[index % 4 == 3],
                max_tokens=9 + index,
                seed=2**62 + index,
                ignore_eos=True,
            ),
            member=2**61 + index,
            round_index=index,
        )
        for index in range(num_requests)
    ]
    engine = make_engine(model, tokenizer, draft_tokens=0)
    give_graphs(engine)
    ends = run_all(engine, requests)
    for request, end in zip(requests, ends, strict=True):
        plain = make_engine(model, tokenizer, draft_tokens=0)
        (alone,) = run_all(plain, [request])
        assert end.token_ids == alone.token_ids
        assert end.logprobs == pytest.approx(alone.logprobs, abs=1e-5)
    stats = engine.stats()["passes"]
    # The first token comes with the prompt; all others from graphs, but in the steps in which one
    # was about to end nearly always ahead.
    assert stats["graph_replays"] == 8 + num_requests - 1
    assert stats["steps_ahead"] == 8 - 1
    assert stats["wasted_rows"] == 0
    assert set(stats["eager_steps"]) == {"prefill"}


def test_a_group_reads_what_it_shares_once(model: Any, tokenizer: Tokenizer) -> None:
    """Members of a group and two strangers, in one graph; all say what they say alone."""
    engine = make_engine(model, tokenizer, draft_tokens=0)
    give_graphs(engine)
    texts = ("tell me all about it", "no", "tell me all about it", "tell me all about it", "so")
    sampling = SamplingParams(temperature=1.0, max_tokens=20, ignore_eos=True)
    requests = [
        GenerationRequest(encode(tokenizer, text), sampling=sampling, member=member)
        for member, text in enumerate(texts)
    ]
    run(engine, requests[0].prompt)  # so that all of them begin with the same pages
    ends = run_all(engine, requests)
    # Eight rows and four groups (one has three of them), beside the first request's graph.
    assert [shape[:4] for shape in graphs_of(engine)] == [(1, 64, 0, 0), (8, 64, 4, 64)]
    for request, end in zip(requests, ends, strict=True):
        (alone,) = run_all(make_engine(model, tokenizer, draft_tokens=0), [request])
        assert end.token_ids == alone.token_ids
        assert end.logprobs == pytest.approx(alone.logprobs, abs=1e-5)
    assert engine.stats()["passes"]["steps_ahead"] >= 17


def test_a_run_ahead_is_dropped_where_its_page_went_to_another(
    model: Any, tokenizer: Tokenizer
) -> None:
    """A run ahead wrote into a free page; the sequence got another one."""
    engine = make_engine(model, tokenizer, draft_tokens=0)
    passes = give_graphs(engine)
    prompt = encode(tokenizer, "tell me")
    expected = run(make_engine(model, tokenizer, draft_tokens=0), prompt, sampling=LONG)
    engine.add(GenerationRequest(prompt, sampling=LONG))
    (sequence,) = engine._sequences.values()
    taken: list[int] = []
    while engine.has_work:
        for event in engine.step():
            if isinstance(event, FinishedEvent):
                assert event.completion.token_ids == expected.token_ids
        if sequence.page_ahead is not None:
            pages = engine.pool.allocate(1, after=sequence.page_ahead - 1)
            assert pages == [sequence.page_ahead]
            engine.pool.pages[:, :, pages[0]] = 1e3
            taken += pages
    assert len(taken) >= 4
    assert passes.stats()["wasted_rows"] == len(taken)
    assert bool((engine.pool.pages[:, :, taken] == 1e3).all())


def test_without_a_free_page_nothing_runs_ahead(model: Any, tokenizer: Tokenizer) -> None:
    engine = make_engine(model, tokenizer, draft_tokens=0)
    passes = give_graphs(engine)
    prompt = encode(tokenizer, "tell me")
    expected = run(make_engine(model, tokenizer, draft_tokens=0), prompt, sampling=LONG)
    engine.add(GenerationRequest(prompt, sampling=LONG))
    (sequence,) = engine._sequences.values()
    engine.step()
    held = engine.pool.allocate(engine.pool.num_free)
    needs = 0
    while engine.has_work:
        if len(sequence.token_ids) == len(sequence.pages) * 4 + 1:
            engine.pool.release([held.pop()])
            assert passes._ahead is None
            needs += 1
        events = engine.step()
    assert needs >= 4
    assert events[-1].completion.token_ids == expected.token_ids
    assert passes.stats()["wasted_rows"] == 0


def test_an_unexpected_end_wastes_one_row(model: Any, tokenizer: Tokenizer) -> None:
    engine = make_engine(model, tokenizer, draft_tokens=0)
    passes = give_graphs(engine)
    texts = ("one", "two", "three")
    ids = [engine.add(GenerationRequest(encode(tokenizer, text), sampling=LONG)) for text in texts]
    for _ in range(5):
        engine.step()
    assert passes._ahead is not None
    engine.abort(ids[1])
    told = {i: [] for i in ids}
    while engine.has_work:
        for event in engine.step():
            if isinstance(event, TokenEvent):
                told[event.request_id].append(event.token_id)
    assert told[ids[1]] == []
    assert passes.stats()["wasted_rows"] == 1
    for text, request_id in zip(texts, ids, strict=True):
        if told[request_id]:
            alone = run(make_engine(model, tokenizer), encode(tokenizer, text), sampling=LONG)
            assert told[request_id] == alone.token_ids[5:]


def test_rows_of_padding_write_to_no_page(model: Any, tokenizer: Tokenizer) -> None:
    engine = make_engine(model, tokenizer, draft_tokens=0, prefix_cache=False)
    give_graphs(engine)
    engine.pool.pages.fill_(torch.nan)
    for text in ("one", "two", "three"):  # a graph of four rows
        engine.add(GenerationRequest(encode(tokenizer, text), sampling=LONG))
    while len(engine._sequences) == 3:
        kept = [list(s.pages) for s in engine._sequences.values()]
        computed = [s.num_computed for s in engine._sequences.values()]
        ahead = [s.page_ahead for s in engine._sequences.values()]
        written = ~engine.pool.pages[0, 0, :, :, 0, 0].isnan()
        # Besides, there is what one step ahead may have written: one slot a sequence.
        most = sum(computed) + 3 * (engine._passes._ahead is not None)
        assert sum(computed) <= int(written.sum()) <= most, (kept, ahead)
        engine.step()


def test_weights_that_move_make_new_graphs(model: Any, tokenizer: Tokenizer) -> None:
    engine = make_engine(model, tokenizer, draft_tokens=0, prefix_cache=False)
    passes = give_graphs(engine)
    prompt = encode(tokenizer, "tell me")
    flip(model, 0)  # whatever the tests before have left
    before = run(engine, prompt, sampling=LONG)
    assert passes.stats()["graphs_captured"] == 1
    flip(model, 1)
    engine.update_weights(lambda model: flip(model, 0))
    assert run(engine, prompt, sampling=LONG).token_ids == before.token_ids
    assert passes.stats()["graphs_captured"] == 1  # written in place
    matrix = model.language.layers[0].mlp.down_proj.weight

    def move(model: Any) -> None:
        matrix.data = -matrix.data

    engine.update_weights(move)
    other = run(engine, prompt, sampling=LONG)
    assert passes.stats()["graphs_captured"] == 2
    plain = make_engine(model, tokenizer)
    assert other.token_ids == run(plain, prompt, sampling=LONG).token_ids != before.token_ids
    flip(model, 0)


def test_the_graph_that_was_used_least_recently_goes(
    model: Any, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 2)
    engine = make_engine(model, tokenizer, draft_tokens=0)
    passes = give_graphs(engine)
    requests = [GenerationRequest(encode(tokenizer, text), sampling=LONG) for text in "abcde"]
    for count in (1, 2, 1, 5, 2):  # 5 takes the place of 2
        run_all(engine, requests[:count])
        assert len(graphs_of(engine)) <= 2
    assert [shape.num_rows for shape in graphs_of(engine)] == [8, 2]
    assert passes.stats()["graphs_captured"] == 4


def test_a_failed_capture_is_reported_and_decoding_goes_on(
    model: Any, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(function: Any) -> Any:
        raise RuntimeError("no memory for graphs")

    engine = make_engine(model, tokenizer, draft_tokens=0)
    passes = give_graphs(engine, refuse)
    prompt = encode(tokenizer, "tell me")
    expected = run(make_engine(model, tokenizer), prompt, sampling=LONG)
    assert run(engine, prompt, sampling=LONG).token_ids == expected.token_ids
    reason = "a capture failed: no memory for graphs"
    assert passes.stats()["graphs"] == reason
    assert passes.stats()["eager_steps"] == {"prefill": 1, reason: 23}
    assert caplog.messages == ["decoding goes on without CUDA graphs: no memory for graphs"]


def test_what_graphs_cannot_hold_is_counted_by_reason(model: Any, tokenizer: Tokenizer) -> None:
    class Even:
        def mask(self, logits: torch.Tensor) -> torch.Tensor:
            return logits.index_fill(0, torch.arange(1, len(logits), 2), -torch.inf)

        def advance(self, token_id: int) -> None:
            assert token_id % 2 == 0

    prompt = encode(tokenizer, "tell me")
    engine = make_engine(model, tokenizer, draft_tokens=0)
    passes = give_graphs(engine)
    even = run(engine, prompt, sampling=LONG, constraint=Even())
    assert (
        even.token_ids
        == run(make_engine(model, tokenizer), prompt, sampling=LONG, constraint=Even()).token_ids
    )
    assert passes.stats()["eager_steps"] == {"prefill": 1, "masked or forced tokens": 23}
    scores = score(engine, prompt, [5, 9, 300])
    plain = make_engine(model, tokenizer)
    assert scores == pytest.approx(score(plain, prompt, [5, 9, 300]), abs=1e-5)
    assert passes.stats()["graph_replays"] == 0


def test_graphs_are_asked_for_and_refused_with_a_reason(model: Any, tokenizer: Tokenizer) -> None:
    for wish, reason in ((None, "the model runs on cpu"), (False, "cuda_graphs is False")):
        engine = make_engine(model, tokenizer, cuda_graphs=wish)
        assert reason in engine.stats()["passes"]["graphs"]
        run(engine, encode(tokenizer, "tell me"))
        assert sum(engine.stats()["passes"]["eager_steps"].values()) == 6
    with pytest.raises(RuntimeError, match="cuda_graphs=True needs a model on CUDA: the model r"):
        make_engine(model, tokenizer, cuda_graphs=True)
    with pytest.raises(ValueError, match="cuda_graphs must be True, False or None, got 1"):
        EngineConfig(cuda_graphs=1)  # type: ignore[arg-type]


def test_buckets() -> None:
    rows = [Shape(n, 1, 0, 0).rounded().num_rows for n in (1, 2, 3, 4, 5, 8, 9, 16, 17, 64, 65)]
    assert rows == [1, 2, 4, 4, 8, 8, 16, 16, 24, 64, 72]
    groups = [Shape(8, 1, n, 1).rounded().num_groups for n in (1, 2, 3, 5, 8)]
    assert groups == [1, 2, 4, 8, 8]
    pages = [Shape(1, n, 0, n).rounded()[1:4] for n in (1, 64, 65, 128, 2049)]
    assert pages == [(n, 0, 0) for n in (64, 64, 128, 128, 4096)]
    assert Shape(1, 1, 1, 65, False, 1023, 3).rounded()[3:] == (128, False, 1024, 4, False)
    assert Shape(1, 1, 0, 0, False, 1024, 4).rounded()[5:7] == (2048, 4)


def test_the_fake_finds_what_a_graph_would_not_do() -> None:
    capture, x = FakeCapture(), torch.ones(3)
    with pytest.raises(AssertionError, match="_local_scalar_dense asks the host"):
        capture(lambda: x * float(x.sum()))
    with pytest.raises(AssertionError, match="with a mask asks the host"):
        capture(lambda: x[x > 0])
    number = [1.0]

    def times() -> torch.Tensor:
        return x * number[0]

    replay = capture(times)
    place = replay().data_ptr()
    x.fill_(2.0)
    assert replay().tolist() == [2.0] * 3 and replay().data_ptr() == place
    number[0] = 5.0  # a graph would go on with 1
    with pytest.raises(AssertionError, match="was recorded as"):
        replay()
    with pytest.raises(AssertionError, match="is gone"):
        capture(lambda: x * 2)()
    tensors = [torch.ones(2)]

    def twice() -> torch.Tensor:
        return tensors[0] * 2

    replay = capture(twice)
    tensors[0] = torch.zeros(2)  # a graph would read the old one
    with pytest.raises(AssertionError, match="was recorded as"):
        replay()
