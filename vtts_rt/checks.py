"""How arguments are checked: rules by name, and one sentence for whatever breaks one."""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from numbers import Integral, Real
from typing import Any, NoReturn

from vtts_rt.types import require

# Whether a value is allowed, and the rule in words: "must be <rule>". A test that raises is failed.
Rule = tuple[Callable[[Any], object], str]


def check(what: str, rules: Mapping[str, Rule], values: Mapping[str, Any]) -> None:
    """ValueError for the first value that breaks the rule of its name."""
    for name, value in values.items():
        test, rule = rules[name]
        try:
            ok = bool(test(value))
        except (AttributeError, OverflowError, TypeError, ValueError):
            ok = False
        require(what, name, value, ok, rule)


def check_same(what: str, made: object, kept: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """ValueError for the first setting that is not what it was when `made`, a file say, was made
    (`kept`, as JSON gives it back). Settings that only one side has are passed over."""
    for name, value in given.items():
        if name in kept:
            same = kept[name] == json.loads(json.dumps(value))
            require(what, name, value, same, f"{kept[name]!r}, that of {made}")


def check_names(what: str, given: Iterable[object], known: Collection[str]) -> None:
    """TypeError for the first name that is not known, with the one it is nearest to."""
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            raise TypeError(f"{what}: unexpected argument {name!r}; {hint}")


def is_whole(value: object) -> bool:
    """An integer, numpy's too; True and False are none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """A real number, numpy's too; True and False are none."""
    return isinstance(value, Real) and not isinstance(value, bool)


def is_flag(value: object) -> bool:
    return isinstance(value, bool)


def is_unicode(value: str | Iterable[str]) -> bool:
    """Whether a text, or all of several, can be encoded: without lone surrogates, which stand for
    bytes of an argument that are not UTF-8, or come from "\\ud800" in JSON."""
    for text in (value,) if isinstance(value, str) else value:
        text.encode()
    return True


UNICODE: Rule = (is_unicode, "valid Unicode")


class CommandParser(argparse.ArgumentParser):
    """One line and exit status 2 for a wrong flag, like every other user's mistake."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(2)
