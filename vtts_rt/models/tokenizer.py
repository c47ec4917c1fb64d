"""Text and prompts to token ids, and token ids back to text as they come."""

from __future__ import annotations

import codecs
import re
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from vtts_rt.models.checkpoint import base_folder, read_eos_token_ids
from vtts_rt.perception.chat import ChatFormat
from vtts_rt.types import Marker, Prompt, Segment, TimeLabel, require

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json")

# What is tokenised to see that a text is too long: where it is longer than this many characters for
# each token there may be (English has four or five), pieces of so many characters.
_CHARACTERS_A_TOKEN = 4
_PIECE_CHARACTERS = 1 << 14
_WORD_END = re.compile(r"[^\W\d_](?=[ \t\n,.;:!?\uff0c\u3002\u3001\uff1b\uff1a\uff01\uff1f])")

# Kinds of tokens of an encoded prompt; markers count as vision, a segment brings its own.
TEXT, LABEL, VISION = 0, 1, 2


@dataclass(frozen=True, slots=True)
class VisionSpan:
    """Pads [start, start + length) of a prompt belong to `segment`; markers stand outside."""

    start: int
    length: int
    segment: Segment


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """Token ids of a prompt with every pad expanded to the tokens of its segment.

    spans: vision segments in order. kinds: (N,) uint8, TEXT, LABEL or VISION for each token.
    """

    token_ids: list[int]
    spans: tuple[VisionSpan, ...]
    kinds: np.ndarray

    def __len__(self) -> int:
        return len(self.token_ids)

    def __add__(self, other: EncodedPrompt) -> EncodedPrompt:
        """This prompt, then `other`."""
        shift = len(self.token_ids)
        moved = (VisionSpan(s.start + shift, s.length, s.segment) for s in other.spans)
        return EncodedPrompt(
            self.token_ids + other.token_ids,
            (*self.spans, *moved),
            np.concatenate((self.kinds, other.kinds)),
        )

    def extended(self, token_ids: Sequence[int]) -> EncodedPrompt:
        """This prompt, then generated text."""
        text = EncodedPrompt(list(token_ids), (), np.full(len(token_ids), TEXT, np.uint8))
        return self + text

    def num_text_tokens(self, start: int, end: int) -> int:
        """Tokens in [start, end) outside vision segments and time labels."""
        return int(np.count_nonzero(self.kinds[start:end] == TEXT))


class Tokenizer:
    """A byte-level BPE tokenizer, with the special tokens of a family's chat format.

    chat: the format. eos_token_ids: ids that end a generation, as the checkpoint's generation
    config says.
    """

    def __init__(self, backend: Any, chat: ChatFormat, eos_token_ids: Iterable[int] = ()) -> None:
        """backend: a fast transformers tokenizer. Without eos_token_ids, its own end token.

        ValueError if it is not byte-level or lacks a vision token.
        """
        fast = getattr(backend, "backend_tokenizer", None)
        decoder = b"" if fast is None or fast.decoder is None else fast.decoder.__getstate__()
        require(
            "Tokenizer", "backend", type(backend).__name__, b"ByteLevel" in decoder, "byte-level"
        )
        vocab = backend.get_vocab()
        for token in chat.vision_tokens:
            require("Tokenizer", "backend", type(backend).__name__, token in vocab, f"with {token}")
        self.chat = chat
        self._backend = backend
        self._tokens: dict[int, str] = {index: token for token, index in vocab.items()}
        added = backend.added_tokens_decoder.items()
        self._skipped = frozenset(index for index, token in added if token.special)
        self.image_token_id: int = vocab[chat.image_pad]
        self.video_token_id: int = vocab[chat.video_pad]
        self.vision_start_token_id: int = vocab[chat.vision_start]
        self.vision_end_token_id: int = vocab[chat.vision_end]
        own = () if backend.eos_token_id is None else (int(backend.eos_token_id),)
        self.eos_token_ids = frozenset(eos_token_ids) or frozenset(own)

    @classmethod
    def from_pretrained(cls, folder: str | Path, chat: ChatFormat) -> Tokenizer:
        """Load from a checkpoint folder, or from the base of an adapter that has no tokenizer of
        its own. ValueError if there is no usable one."""
        from transformers import AutoTokenizer

        folder = Path(folder)
        base = base_folder(folder)
        if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
            folder = base
        try:
            backend = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = getattr(error, "strerror", None) or type(error).__name__
            raise ValueError(
                f"Tokenizer: folder must hold a Hugging Face tokenizer, got {str(folder)!r} "
                f"({reason})"
            ) from error
        return cls(backend, chat, read_eos_token_ids(base))

    def __len__(self) -> int:
        return len(self._tokens)

    @property
    def chat_template(self) -> str | None:
        template: str | None = self._backend.chat_template
        return template

    def token_id(self, token: str) -> int | None:
        """Id of one token by its vocabulary name, or None."""
        index: int | None = self._backend.get_vocab().get(token)
        return index

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; special tokens in it are recognised, none are added."""
        return [int(i) for i in self._backend(text, add_special_tokens=False)["input_ids"]]

    def count(self, text: str) -> int:
        """Number of ids of `text`, which are not made into a list."""
        return len(self._backend.backend_tokenizer.encode(text, add_special_tokens=False))

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids, and for each the characters [start, end) of `text` it stands for."""
        encoded = self._backend(text, add_special_tokens=False, return_offsets_mapping=True)
        return list(encoded["input_ids"]), [(int(a), int(b)) for a, b in encoded["offset_mapping"]]

    def decode(self, token_ids: Iterable[int]) -> str:
        """Text of `token_ids` without special tokens; bytes that are not UTF-8 become U+FFFD."""
        stream = self.stream_decoder()
        return "".join(stream.push(int(i)) for i in token_ids) + stream.finish()

    def stream_decoder(self) -> StreamDecoder:
        return StreamDecoder(self)

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes that a token adds to the text: none for special tokens and unknown ids."""
        token = self._tokens.get(token_id)
        if token is None or token_id in self._skipped:
            return b""
        table = _byte_of_character()
        if all(character in table for character in token):
            return bytes(table[character] for character in token)
        return token.encode()  # an added token is plain text


class StreamDecoder:
    """Detokenises one id at a time; a character is given out when its last byte is in."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        return self._utf8.decode(self._tokenizer.token_bytes(token_id))

    def finish(self) -> str:
        """What an unfinished character leaves: U+FFFD or nothing."""
        return self._utf8.decode(b"", final=True)


def encode_prompt(tokenizer: Tokenizer, prompt: Prompt) -> EncodedPrompt:
    """Tokenise a prompt as transformers does its text, then expand each pad.

    The text is tokenised whole, so merges across parts are the same. A token is a LABEL when all
    its characters are a label's. ValueError if text parts hold vision tokens of their own.
    """
    chat = tokenizer.chat
    pads: list[tuple[int, Segment]] = []  # first character of the pad, its segment
    labels: list[tuple[int, int]] = []
    markers: list[int] = []
    place = 0
    for part in prompt.parts:
        if isinstance(part, Segment):
            pads.append((place + len(chat.vision_start), part))
            place += len(chat.text(Prompt((part,))))
            continue
        if isinstance(part, Marker):
            ends = (chat.vision_start, chat.vision_end)
            require("encode_prompt", "marker", part.text, part.text in ends, " or ".join(ends))
            markers.append(place)
            place += len(part.text)
            continue
        text = part.text if isinstance(part, TimeLabel) else part
        for token in chat.vision_tokens:
            require("encode_prompt", "text", text, token not in text, f"free of {token}")
        if isinstance(part, TimeLabel):
            labels.append((place, place + len(text)))
        place += len(text)

    ids, offsets = tokenizer.encode_with_offsets(chat.text(prompt))
    starts = [start for start, _ in offsets]
    kinds = np.full(len(ids), TEXT, np.uint8)
    kinds[[bisect_left(starts, at) for at in markers]] = VISION
    for start, end in labels:
        for index in range(bisect_left(starts, start), len(ids)):
            if starts[index] >= end:
                break
            if offsets[index][1] <= end:
                kinds[index] = LABEL
    token_ids: list[int] = []
    expanded: list[np.ndarray] = []
    spans = []
    done = 0
    for at, segment in pads:
        index = bisect_left(starts, at)
        assert starts[index] == at, "a pad is one token"
        kinds[index - 1 : index + 2] = VISION
        token_ids += ids[done:index]
        expanded.append(kinds[done:index])
        spans.append(VisionSpan(len(token_ids), segment.num_tokens, segment))
        token_ids += [ids[index]] * segment.num_tokens
        expanded.append(np.full(segment.num_tokens, VISION, np.uint8))
        done = index + 1
    token_ids += ids[done:]
    expanded.append(kinds[done:])
    return EncodedPrompt(token_ids, tuple(spans), np.concatenate(expanded))


def least_tokens(tokenizer: Tokenizer, prompt: Prompt, limit: int) -> int:
    """A number of tokens that a prompt has at least, above `limit` where that takes little to see.

    Vision counts by arithmetic. Of text that might exceed the limit, pieces are counted until they
    do. They end where every byte-level tokenizer's words do, behind a letter and before a space or
    a mark, so that none has fewer tokens in the whole; of one cut in a word half are counted.
    """
    num_tokens = sum(part.num_tokens for part in prompt.parts if isinstance(part, Segment))
    texts = [part for part in prompt.parts if isinstance(part, str)]
    if num_tokens + sum(map(len, texts)) <= _CHARACTERS_A_TOKEN * limit:
        return num_tokens
    for text in texts:
        start = 0
        while start < len(text) and num_tokens <= limit:
            goal = start + _PIECE_CHARACTERS
            end = _WORD_END.search(text, goal, goal + _PIECE_CHARACTERS)
            stop = goal if end is None else end.end()
            whole = end is not None or stop >= len(text)
            num_tokens += tokenizer.count(text[start:stop]) // (1 if whole else 2)
            start = stop
    return num_tokens


@lru_cache(maxsize=1)
def _byte_of_character() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for.

    Printable Latin-1 bytes stand for themselves, the others follow from U+0100 (GPT-2's BPE).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(0x100 + index): byte for index, byte in enumerate(others)}
