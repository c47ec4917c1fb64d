"""Prompts become the ids transformers gives; ids become text without breaking characters."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from utils import tiny_tokenizer

from vtts_rt.models.mrope import MropePositions, build_position_ids
from vtts_rt.models.qwen2_5_vl import GEOMETRY
from vtts_rt.models.qwen2_5_vl.chat import CHAT
from vtts_rt.models.tokenizer import LABEL, TEXT, VISION, Tokenizer, encode_prompt, least_tokens
from vtts_rt.types import Marker, PairRef, PixelBox, Prompt, Segment, TimeLabel

TEXTS = [
    "Which pattern is on the red card?",
    "naïve café, 東京 \U0001f600\U0001f600 end",
    "<|im_start|>user\nhi<|im_end|>\n<think>a</think>",
    " leading, trailing ",
    "",
]


@pytest.fixture(scope="module")
def backend() -> Any:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def tokenizer(backend: Any) -> Tokenizer:
    return Tokenizer(backend, CHAT)


def segment(pairs: int, height: int, width: int, is_image: bool = False) -> Segment:
    refs = tuple(PairRef(0, "v", 2 * i, 2 * i + 1, float(i)) for i in range(pairs))
    return Segment(refs, PixelBox(0, 0, 64, 64), (height, width), GEOMETRY, 1.5, is_image)


@pytest.mark.parametrize("text", TEXTS)
def test_text_ids_equal_transformers(backend: Any, tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids == backend(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == backend.decode(ids, skip_special_tokens=True)


def test_stream_equals_whole_decode_and_never_splits_a_character(
    backend: Any, tokenizer: Tokenizer
) -> None:
    text = "東京 \U0001f600 ünï"
    pieces = []
    stream = tokenizer.stream_decoder()
    for token in tokenizer.encode(text):
        pieces.append(stream.push(token))
    assert "" in pieces  # characters did span tokens
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) + stream.finish() == text

    rng = random.Random(0)
    for _ in range(200):  # broken UTF-8 included
        ids = [rng.randrange(len(tokenizer)) for _ in range(rng.randint(1, 12))]
        stream = tokenizer.stream_decoder()
        streamed = "".join(stream.push(i) for i in ids) + stream.finish()
        assert streamed == tokenizer.decode(ids) == backend.decode(ids, skip_special_tokens=True)


def test_an_unfinished_character_is_held_back(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("京")
    stream = tokenizer.stream_decoder()
    assert [stream.push(i) for i in ids[:-1]] == [""] * (len(ids) - 1)
    assert stream.finish() == "\ufffd"
    assert tokenizer.token_bytes(10**6) == b""  # an id beyond the vocabulary adds nothing


def test_prompt_ids_equal_transformers_with_pads_expanded(
    backend: Any, tokenizer: Tokenizer
) -> None:
    prompt = Prompt(
        (
            "<|im_start|>user\nLook:\n",
            TimeLabel("<12.0s>"),
            segment(2, 56, 84),
            Marker("<|vision_start|>"),
            TimeLabel("<3.5s>"),
            segment(1, 28, 28, is_image=True),
            Marker("<|vision_end|>"),
            "Which ",
            "pattern?<|im_end|>\n",
        )
    )
    encoded = encode_prompt(tokenizer, prompt)
    text = CHAT.text(prompt).replace("<|video_pad|>", "<|video_pad|>" * 12)
    assert encoded.token_ids == backend(text, add_special_tokens=False)["input_ids"]
    assert [(span.length, span.segment) for span in encoded.spans] == [
        (12, prompt.segments[0]),
        (1, prompt.segments[1]),
    ]
    pads = {tokenizer.image_token_id, tokenizer.video_token_id}
    places = [i for i, token in enumerate(encoded.token_ids) if token in pads]
    assert places == [i for s in encoded.spans for i in range(s.start, s.start + s.length)]
    # 13 pads and 3 x 2 markers are vision; labels are exactly their characters.
    assert (encoded.kinds == VISION).sum() == 19
    labels = [t for t, k in zip(encoded.token_ids, encoded.kinds, strict=True) if k == LABEL]
    assert tokenizer.decode(labels) == "<12.0s><3.5s>"
    texts = [t for t, k in zip(encoded.token_ids, encoded.kinds, strict=True) if k == TEXT]
    assert tokenizer.decode(texts) == "user\nLook:\nWhich pattern?\n"
    assert encoded.num_text_tokens(0, len(encoded)) == len(texts)
    assert encoded.num_text_tokens(*encoded_range(encoded.spans[0])) == 0


def encoded_range(span: Any) -> tuple[int, int]:
    return span.start, span.start + span.length


def test_a_token_that_merges_with_text_is_not_a_label(tokenizer: Tokenizer) -> None:
    joined = encode_prompt(tokenizer, Prompt(("a", TimeLabel("ssist"), "ant")))
    assert joined.token_ids == tokenizer.encode("assistant")
    for index in range(len(joined)):
        if joined.kinds[index] == LABEL:
            assert tokenizer.decode(joined.token_ids[index : index + 1]) in "ssist"
    assert len(joined) < 9  # the word did merge


def test_rounds_concatenate(tokenizer: Tokenizer) -> None:
    first = encode_prompt(tokenizer, Prompt(("Look: ", segment(1, 28, 56), "?")))
    second = encode_prompt(tokenizer, Prompt(("Again: ", segment(2, 28, 28))))
    whole = first.extended([5, 6]) + second
    assert whole.token_ids == [*first.token_ids, 5, 6, *second.token_ids]
    shift = len(first) + 2
    assert whole.spans[0] == first.spans[0]
    assert whole.spans[1].start == second.spans[0].start + shift
    assert whole.kinds.tolist() == [*first.kinds, TEXT, TEXT, *second.kinds]


@pytest.mark.parametrize("parity", ["release", "transformers"])
def test_positions_of_a_prompt_continue_over_rounds(tokenizer: Tokenizer, parity: Any) -> None:
    first = encode_prompt(tokenizer, Prompt(("Look: ", segment(4, 56, 84), "?")))
    second = encode_prompt(tokenizer, Prompt(("Again: ", segment(2, 28, 28))))
    whole = build_position_ids(first + second, MropePositions(parity, 2))
    builder = MropePositions(parity, 2)
    parts = [build_position_ids(item, builder) for item in (first, second)]
    assert whole.tolist() == [a + b for a, b in zip(*(p.tolist() for p in parts), strict=True)]
    start, end = encoded_range(first.spans[0])
    assert whole.shape == (3, len(first) + len(second))
    # 3 pair steps of 1.5 s x 2 tokens a second; text goes on by the rule.
    assert whole[0, end - 1] - whole[0, start] == 9
    assert whole[0, end] - whole[0, start] == (10 if parity == "release" else 3)


def test_a_lower_bound_of_tokens_is_one(tokenizer: Tokenizer) -> None:
    rng = random.Random(0)
    words = [
        "red",
        "card",
        ", ",
        " ",
        "\n",
        "\u4e16\u754c",
        "\u3002",
        "x" * 40,
        "12",
        "caf\u00e9",
        ". ",
    ]
    pieces = Prompt((segment(3, 56, 84), "".join(rng.choices(words, k=30_000)), segment(1, 28, 28)))
    true = len(encode_prompt(tokenizer, pieces))
    vision = 3 * 6 + 1
    for limit in (0, 10, 1000, true // 4, true // 2, true):
        assert vision <= least_tokens(tokenizer, pieces, limit) <= true
    assert least_tokens(tokenizer, pieces, true // 8) > true // 8  # and good enough to refuse by


@pytest.mark.parametrize("token", ["<|video_pad|>", "<|image_pad|>", "<|vision_start|>"])
def test_text_may_not_bring_vision_tokens(tokenizer: Tokenizer, token: str) -> None:
    with pytest.raises(ValueError, match="encode_prompt: text must be free of"):
        encode_prompt(tokenizer, Prompt((f"what is {token}?", segment(1, 28, 28))))
    with pytest.raises(ValueError, match="encode_prompt: marker must be <.vision_start.> or"):
        encode_prompt(tokenizer, Prompt((Marker("<|im_end|>"),)))


def test_stop_tokens_come_from_the_checkpoint(backend: Any, tmp_path: Path) -> None:
    backend.save_pretrained(tmp_path)
    im_end, end_of_text = (
        backend.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|endoftext|>")
    )
    assert Tokenizer.from_pretrained(tmp_path, CHAT).eos_token_ids == {im_end}
    (tmp_path / "config.json").write_text('{"text_config": {"eos_token_id": 3}}')
    assert Tokenizer(backend, CHAT, [3]).eos_token_ids == {3}
    (tmp_path / "generation_config.json").write_text(
        f'{{"eos_token_id": [{im_end}, {end_of_text}]}}'
    )
    (tmp_path / "config.json").unlink()
    assert Tokenizer.from_pretrained(tmp_path, CHAT).eos_token_ids == {im_end, end_of_text}


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Tokenizer: folder must hold"):
        Tokenizer.from_pretrained(tmp_path, CHAT)


def test_other_tokenizers_are_refused() -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers import models
    from transformers import PreTrainedTokenizerFast

    words = PreTrainedTokenizerFast(tokenizer_object=Backend(models.WordLevel({"a": 0}, "a")))
    with pytest.raises(ValueError, match="backend must be byte-level"):
        Tokenizer(words, CHAT)
