"""The small tokenizer of the embedded model: byte-level BPE with Qwen2.5-VL's special tokens."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from vtts_rt.models.qwen2_5_vl.chat import CHAT, END_OF_TEXT, SPECIAL_TOKENS
from vtts_rt.perception.dialect import TAGS

# Numbers split into pairs of digits and one decimal, so that a time is `12` `.0` and a model can
# copy it from a label; the joints of a clue are one token each.
_PIECES = r"s>|\.\d| ?[A-Za-z]+|\d{1,2}|\)\] ?\[?|\[\(|\), \(|, | /|\s+|[^\sA-Za-z\d]"
_JOINTS = (")] [", ")]", "[(", "), (", ", ", "s>", "\n\n", " /")

# A chat with text, images and videos as Qwen2.5-VL writes it, without a default system turn.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    + CHAT.turn_open.format(role="{{ message['role'] }}")
    + "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    f"{{% if part['type'] == 'image' %}}{CHAT.vision_start}{CHAT.image_pad}{CHAT.vision_end}"
    f"{{% elif part['type'] == 'video' %}}{CHAT.vision_start}{CHAT.video_pad}{CHAT.vision_end}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    + CHAT.turn_close
    + "{% endfor %}{% if add_generation_prompt %}"
    + CHAT.turn_open.format(role="assistant")
    + "{% endif %}"
)


def byte_symbols() -> dict[int, str]:
    """The printable stand-in of each byte that byte-level BPE uses (GPT-2's table)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {byte: chr(byte) for byte in plain}
    spare = 256
    for byte in range(256):
        if byte not in table:
            table[byte] = chr(spare)
            spare += 1
    return table


def build_tokenizer(words: Iterable[str]) -> Tokenizer:
    """A tokenizer that keeps whole `words` (with their leading space, if any), the numbers 0 to
    99, one decimal, and the joints of a clue; all other text falls apart into bytes.
    """
    symbols = byte_symbols()
    vocab = {symbols[byte]: byte for byte in range(256)}
    units = [f"{n:02d}" for n in range(100)] + [str(n) for n in range(10, 100)]
    units += [f".{n}" for n in range(10)] + list(_JOINTS) + list(words)
    for unit in dict.fromkeys(units):
        vocab.setdefault("".join(symbols[byte] for byte in unit.encode()), len(vocab))
    # No merges: a piece is an entry as a whole, or it is spelt in bytes.
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    split = pre_tokenizers.Split(Regex(_PIECES), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for pair in TAGS.values() for t in pair])
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """tokenizer.json and tokenizer_config.json (with the chat template), as transformers reads."""
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": CHAT.end_of_turn,
        "pad_token": END_OF_TEXT,
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        "clean_up_tokenization_spaces": False,
        "model_max_length": 32768,
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
