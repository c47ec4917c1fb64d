"""Which values the fields of SamplingParams take, and as what they are kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import Any


def _a(kind: type[Any], value: Any) -> Any:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise TypeError
    return value


def _number(value: Any) -> float:
    return float(_a(Real, value))


def _whole(value: Any) -> int:
    return int(_a(Integral, value))


def _ids(value: Any) -> tuple[int, ...]:
    return tuple(map(_whole, value))


def _bias(value: Any) -> dict[int, float]:
    """Ids of requests in JSON are texts."""
    texts = {key: int(key) for key in _a(Mapping, value) if isinstance(key, str) and key.isdigit()}
    bias = {_whole(texts.get(key, key)): _number(number) for key, number in value.items()}
    if len(bias) < len(value):
        raise ValueError
    return bias


def _texts(value: Any) -> tuple[str, ...]:
    texts = tuple(_a(str, text) for text in ((value,) if isinstance(value, str) else value))
    for text in texts:
        text.encode()  # fails for lone surrogates
    return texts


_IDS = ("a list of token ids", _ids, lambda ids: all(0 <= i < 2**31 for i in ids))
_PENALTY = ("in [-2, 2]", _number, lambda v: -2.0 <= v <= 2.0)
# Field -> rule in words, conversion, test. A temperature that is not 0 keeps quotients finite.
SAMPLING_RULES: dict[str, tuple[str, Callable[[Any], Any], Callable[[Any], bool]]] = {
    "temperature": ("0 or in [1e-20, 1e4)", _number, lambda v: v == 0 or 1e-20 <= v < 1e4),
    "top_p": ("in (0, 1]", _number, lambda v: 0.0 < v <= 1.0),
    "top_k": ("a whole number >= 0", _whole, lambda v: 0 <= v < 2**31),
    "max_tokens": ("a whole number >= 1", _whole, lambda v: 1 <= v < 2**31),
    "seed": ("a whole number in [0, 2**63)", _whole, lambda v: 0 <= v < 2**63),
    "stop": ("a text or a list of texts, none empty, of valid Unicode", _texts, all),
    "ignore_eos": ("True or False", lambda v: _a(bool, v), lambda v: True),
    "repetition_penalty": ("in (0, 1e4)", _number, lambda v: 0.0 < v < 1e4),
    "presence_penalty": _PENALTY,
    "frequency_penalty": _PENALTY,
    "min_tokens": ("a whole number >= 0", _whole, lambda v: 0 <= v < 2**31),
    "stop_token_ids": _IDS,
    "logit_bias": (
        "token ids with numbers in [-100, 100]",
        _bias,
        lambda bias: all(0 <= i < 2**31 and -100.0 <= v <= 100.0 for i, v in bias.items()),
    ),
    "no_repeat_ngram_size": ("a whole number >= 0", _whole, lambda v: 0 <= v < 2**31),
    "suppress_tokens": _IDS,
    "begin_suppress_tokens": _IDS,
    "bad_words_ids": (
        "a list of lists of token ids, none empty",
        lambda value: tuple(map(_ids, value)),
        lambda runs: all(run and min(run) >= 0 and max(run) < 2**31 for run in runs),
    ),
    "logprobs": ('"processed" or "raw"', lambda v: _a(str, v), ("processed", "raw").__contains__),
}
