from __future__ import annotations

from pathlib import Path

import pytest
from tiny.recipe import make_tokenizer
from tiny.tokenizer import save_tokenizer

from vtts_rt.models.qwen2_5_vl.chat import CHAT, SPECIAL_TOKENS
from vtts_rt.models.tokenizer import Tokenizer
from vtts_rt.perception.dialect import TAGS

TEXTS = (
    "Which pattern is on the red card?\nA. red green / blue yellow\n",
    "<12.0s><|vision_start|><|video_pad|><|vision_end|>",
    "<think> red green / blue yellow</think><answer>A</answer>",
    "<glue>[(12.0, 14.5), (20.0, 21.0)] [0.2, 0.4, 0.6, 1.0]</glue><|im_end|>",
    "na\u00efve \u65e5\u672c \U0001f600 448 x=1.25\n\n  tab\there",
    "",
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(make_tokenizer(), folder)
    return Tokenizer.from_pretrained(folder, CHAT)


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_comes_back(text: str) -> None:
    raw = make_tokenizer()
    assert raw.decode(raw.encode(text).ids, skip_special_tokens=False) == text


def test_times_and_clues_are_few_tokens(tokenizer: Tokenizer) -> None:
    def pieces(text: str) -> list[str]:
        return [tokenizer.decode([i]) for i in tokenizer.encode(text)]

    assert pieces("<12.0s>") == ["<", "12", ".0", "s>"]
    assert pieces("[(8.0, 12.5)] [0.2, 1.0") == [
        "[(", "8", ".0", ", ", "12", ".5", ")] [", "0", ".2", ", ", "1", ".0",
    ]  # fmt: skip
    for tags in TAGS.values():
        for tag in tags:
            assert len(tokenizer.encode(tag)) == 1
    for number in range(100):
        assert len(tokenizer.encode(str(number))) == 1


def test_special_tokens_and_chat_template(tokenizer: Tokenizer, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    for token in SPECIAL_TOKENS:
        assert len(tokenizer.encode(token)) == 1
    assert tokenizer.encode("<|im_end|>")[0] in tokenizer.eos_token_ids
    save_tokenizer(make_tokenizer(), tmp_path)
    backend = AutoTokenizer.from_pretrained(str(tmp_path))
    content = [{"type": "video"}, {"type": "text", "text": "Hm?"}]
    text = backend.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    assert text == (
        "<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>Hm?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
