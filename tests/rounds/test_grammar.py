"""Constrained clues: whatever a model prefers, what it writes into the tag is a clue."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny.tokenizer import build_tokenizer
from transformers import PreTrainedTokenizerFast

from vtts_rt.bench.model import qwen_tokenizer
from vtts_rt.models.qwen2_5_vl.chat import CHAT
from vtts_rt.models.registry import resolve_model
from vtts_rt.models.tokenizer import Tokenizer
from vtts_rt.perception.clue import parse_clue
from vtts_rt.perception.published import published_spans
from vtts_rt.rounds.grammar import (
    CONTENT,
    LITERAL,
    MAX_BOXES,
    MAX_SPANS,
    OPENING,
    ClueGrammar,
    GrammarState,
)

PADDING = 40  # logits of Qwen's models are wider than their tokenizer
LONGEST = 1 + 2 + MAX_SPANS * 33 + 3 + MAX_BOXES * 65 + 1 + len("</glue>")  # characters, at most

# Entries that hold a tag, or the end of one, and what stands beside it.
STRADDLING = (
    *("e>[", ">[(", ">no", "ue>(1", "e>[(1, 2)]</glue>", "e><", "x<glue>[[", "<glue>no"),
    *("<glue>[(3, 4)]</glue>\n", ")]</glue>\n\n", ")</glue><glue>[", "3]</g", "></answer>"),
)


def tiny() -> Tokenizer:
    return Tokenizer.from_pretrained(resolve_model("tiny"), CHAT)


def straddling() -> Tokenizer:
    backend = PreTrainedTokenizerFast(
        tokenizer_object=build_tokenizer(STRADDLING), eos_token="<|im_end|>"
    )
    return Tokenizer(backend, CHAT)


def qwen() -> Tokenizer:
    try:
        return Tokenizer(qwen_tokenizer(), CHAT)
    except RuntimeError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module", params=[tiny, straddling, qwen], ids=lambda make: make.__name__)
def grammar(request: pytest.FixtureRequest) -> ClueGrammar:
    return ClueGrammar(request.param())


@pytest.fixture(scope="module")
def odd_grammar() -> ClueGrammar:
    return ClueGrammar(straddling())


def write(state: GrammarState, token_ids: Iterable[int]) -> None:
    """Tokens that a model chose, each of which must be allowed and keep its logit."""
    width = len(state._grammar.tokenizer) + PADDING
    for token_id in token_ids:
        logits = torch.randn(width)
        assert state.mask(logits)[token_id] == logits[token_id]
        state.advance(token_id)


def sample(state: GrammarState, bias: torch.Tensor, seed: int) -> list[int]:
    """What a random model writes until the tag is closed; it never prefers to end."""
    noise = torch.Generator().manual_seed(seed)
    token_ids: list[int] = []
    while state.in_clue:
        logits = bias + torch.randn(len(bias), generator=noise)
        token_ids.append(int(state.mask(logits).argmax()))
        state.advance(token_ids[-1])
        assert len(token_ids) <= LONGEST
    return token_ids


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    "opening", ["<glue>", "<think>no</think><answer>A</answer><glue>", "a << GLUE  >"]
)
def test_a_random_model_writes_a_clue(grammar: ClueGrammar, opening: str, seed: int) -> None:
    tokenizer, state = grammar.tokenizer, grammar.start()
    begin = tokenizer.encode(opening)
    write(state, begin)
    bias = torch.zeros(len(tokenizer) + PADDING)
    clue = parse_clue(tokenizer.decode(begin + sample(state, bias, seed)))
    assert clue.usable and not clue.problems, clue
    assert len(clue.spans) <= MAX_SPANS and len(clue.boxes) <= MAX_BOXES


@pytest.mark.parametrize("seed", range(4))
def test_a_model_that_never_wants_to_close_has_to(grammar: ClueGrammar, seed: int) -> None:
    tokenizer, state = grammar.tokenizer, grammar.start()
    begin = tokenizer.encode("<glue>")
    write(state, begin)
    bias = torch.zeros(len(tokenizer) + PADDING)
    for index in range(len(tokenizer)):
        if b"<" in tokenizer.token_bytes(index):
            bias[index] = -100.0
    written = begin + sample(state, bias, seed)
    clue = parse_clue(tokenizer.decode(written))
    assert clue.usable and not clue.problems, clue
    assert len(clue.spans) <= MAX_SPANS and len(clue.boxes) <= MAX_BOXES


@pytest.mark.parametrize("seed", range(8))
def test_free_text_may_open_the_tag_at_any_time(odd_grammar: ClueGrammar, seed: int) -> None:
    """Random tokens of a vocabulary in which every other one straddles a tag."""
    tokenizer, state = odd_grammar.tokenizer, odd_grammar.start()
    noise = torch.Generator().manual_seed(seed)
    wanted = [i for i in range(len(tokenizer)) if re.search(rb"[<>]", tokenizer.token_bytes(i))]
    wanted += tokenizer.encode("glue")
    bias = torch.full((len(tokenizer),), -1.0)
    bias[wanted] = 2.0
    token_ids: list[int] = []
    while len(token_ids) < 150 or state.in_clue:
        logits = bias + torch.randn(len(bias), generator=noise)
        token_ids.append(int(state.mask(logits).argmax()))
        state.advance(token_ids[-1])
    text = tokenizer.decode(token_ids)
    clue = parse_clue(text)
    assert clue.usable and not clue.problems, clue
    contents = re.findall(r"<glue>(.*?)</glue>", text, re.DOTALL | re.IGNORECASE)
    assert len(contents) > 5
    for content in contents:
        assert re.fullmatch(CONTENT, content), content


@pytest.mark.parametrize(
    ("most", "one_more"),
    [
        ("(1, 2)" * MAX_SPANS, "(1, 2)"),
        ("[(1, 2)], " + "[1, 2, 3, 4]\n" * MAX_BOXES, "[1, 2, 3, 4]"),
        ("[" + "[1, 2, 3, 4], " * (MAX_BOXES - 1) + "[1, 2, 3, 4]] (1, 2), (3, 4)", "[1, 2, 3, 4]"),
        ("[(123456", "7"),
        ("[(1.123456", "7"),
        ("[(1,", "  "),
        ("", "</glue>"),
        ("[", "]"),
        ("(1", ")"),
        ("[1, 2, 3", "]"),
        ("(1", "\n"),
        ("(", "-1"),
        ("(1, 2)", "\xa0"),
    ],
)
def test_the_bounds_of_a_clue(odd_grammar: ClueGrammar, most: str, one_more: str) -> None:
    state = odd_grammar.start()
    assert state.feed(f"<glue>{most}".encode())
    assert not state.feed(one_more.encode())


@pytest.mark.parametrize(
    "text",
    [
        "<think>a</think><answer>B</answer><glue>[(1.5, 2.0)]</glue>",
        "<think>a < b, 1 > 0</think><answer>B</answer><glue>[(12.0, 15.5), (20, 22)]</glue> ok",
        "<answer>B</answer>\n<glue>\n[(1, 2)]\n</glue>\n",
        "<think> card</think><answer>C</answer><glue>[(3.0, 5.0)] [0.1, 0.2, 0.5, 0.6]</glue>",
        "<glue>[0.1, 0.2, 0.5, 0.6]</glue><answer>A</answer>",
        "<glue>[[100, 200, 300, 400], [1, 2, 3, 4]], [(0, 999999.123456)]</glue>",
        "<glue>(1, 2)</glue><glue>[3, 4]</glue>",
    ],
)
def test_a_clue_that_the_model_writes_by_itself_is_left_alone(
    grammar: ClueGrammar, text: str
) -> None:
    assert not parse_clue(text).problems
    write(grammar.start(), grammar.tokenizer.encode(text))


@given(st.from_regex(CONTENT, fullmatch=True))
@settings(max_examples=100, deadline=None)
def test_all_that_the_grammar_allows_is_a_clue(odd_grammar: ClueGrammar, content: str) -> None:
    clue = parse_clue(f"<glue>{content}</glue>")
    assert clue.usable and not clue.problems
    assert len(clue.spans) <= MAX_SPANS and len(clue.boxes) <= MAX_BOXES
    state = odd_grammar.start()
    assert state.feed(f"<glue>{content}</glue>".encode()) and not state.in_clue


@pytest.fixture(scope="module")
def literal_grammar() -> ClueGrammar:
    return ClueGrammar(tiny(), literal=True)


@pytest.mark.parametrize("seed", range(3))
def test_official_is_kept_to_what_its_rule_reads(literal_grammar: ClueGrammar, seed: int) -> None:
    tokenizer, state = literal_grammar.tokenizer, literal_grammar.start()
    begin = tokenizer.encode("<glue>")
    write(state, begin)
    bias = torch.zeros(len(tokenizer) + PADDING)
    content = tokenizer.decode(sample(state, bias, seed)).split("</glue>")[0]
    assert re.fullmatch(LITERAL, content)
    assert 1 <= len(published_spans(content)) <= MAX_SPANS


@given(st.from_regex(LITERAL, fullmatch=True))
@settings(max_examples=100, deadline=None)
def test_a_literal_is_read_alike_by_both_rules(content: str) -> None:
    spans = published_spans(content)
    assert spans and spans == parse_clue(f"<glue>{content}</glue>").spans


@pytest.mark.parametrize("grammar", [tiny, qwen], indirect=True)
def test_outside_the_tag_nothing_changes(grammar: ClueGrammar) -> None:
    tokenizer, state = grammar.tokenizer, grammar.start()
    logits = torch.randn(len(tokenizer) + PADDING)
    text = "<think>1 < 2 > <glu e> </glue> naïve 時</think><answer>B</answer>"
    end = min(tokenizer.eos_token_ids)
    for token_id in [*tokenizer.encode(text), end]:
        assert state.mask(logits) is logits
        state.advance(token_id)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_in_the_tag_only_text_of_a_clue_is_allowed(
    grammar: ClueGrammar, dtype: torch.dtype
) -> None:
    tokenizer, state = grammar.tokenizer, grammar.start()
    write(state, tokenizer.encode("<glue>["))
    logits = torch.randn(len(tokenizer) + PADDING).to(dtype)
    before = logits.clone()
    masked = state.mask(logits)
    assert masked.dtype == dtype and torch.equal(logits, before)
    kept = masked > -torch.inf
    assert torch.equal(masked[kept], logits[kept])
    assert not kept[len(tokenizer) :].any()
    for index in torch.nonzero(kept).flatten().tolist():
        assert re.match(rb"[0-9(\[ ]", tokenizer.token_bytes(index))
    assert kept[tokenizer.encode("(")[0]] and not kept[list(tokenizer.eos_token_ids)].any()
    with pytest.raises(ValueError, match="token_id must be a token that the mask allows"):
        state.advance(min(tokenizer.eos_token_ids))


def test_a_token_may_straddle_the_tag_and_what_stands_beside_it(odd_grammar: ClueGrammar) -> None:
    tokenizer = odd_grammar.tokenizer
    logits = torch.zeros(len(tokenizer))
    ids = {
        text: tokenizer.token_id(text.replace(" ", "Ġ").replace("\n", "Ċ")) for text in STRADDLING
    }

    def allowed(*written: str) -> set[str]:
        state = odd_grammar.start()
        for text in written:
            write(state, [ids[text]] if text in ids else tokenizer.encode(text))
        kept = state.mask(logits)
        return {text for text, index in ids.items() if kept[index] == 0.0}

    assert set(STRADDLING) - allowed("a") == {"<glue>no"}
    assert set(STRADDLING) - allowed("<glu") == {"<glue>no", "e><"}
    assert set(STRADDLING) - allowed("<glue") == {"<glue>no", ">no", "></answer>"}
    assert allowed("x<glue>[[", "1, 2") == {")]</glue>\n\n"}
    assert allowed("<glue>[(1, 2") == {")]</glue>\n\n"}
    assert allowed("<glue>(1, 2") == {")</glue><glue>[", "3]</g"}
    assert allowed("<glue>[1, ") == {"3]</g"}
    assert allowed("<glue>[1, 2]</glue") == {">[(", ">no", "></answer>"}
    assert "3]</g" in allowed("<glu", "e>[(1, 2)]</glue>")


def test_without_the_library_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(RuntimeError, match=r'pip install "vtts_rt\[grammar\]"'):
        ClueGrammar(tiny())


def test_the_opening_tags_that_the_parser_reads_are_those_of_the_grammar() -> None:
    for before in range(7):
        for after in range(7):
            text = f"<{' ' * before}Glue{' ' * after}>(1, 2)"
            found = OPENING.search(text.encode()) is not None
            assert found == parse_clue(text).usable == (max(before, after) <= 4)
