"""The public signatures, as they stand in signatures.txt.

A change that is meant: `python tests/test_signatures.py > tests/signatures.txt`.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import vtts_rt
from vtts_rt.rounds.ask import AskOptions

SNAPSHOT = Path(__file__).with_name("signatures.txt")


def functions(name: str) -> Iterator[tuple[str, object]]:
    """(name, function) of a public name: itself, its constructor and its public methods."""
    value = getattr(vtts_rt, name)
    if not inspect.isclass(value):
        yield name, value
        return
    if value.__init__ is not object.__init__ and not getattr(value, "_is_protocol", False):
        yield name, value
    for attribute in sorted(vars(value)):
        member = inspect.getattr_static(value, attribute)
        if attribute.startswith("_"):
            continue
        if isinstance(member, classmethod | staticmethod) or inspect.isfunction(member):
            yield f"{name}.{attribute}", getattr(value, attribute)


def signatures() -> list[str]:
    names = sorted(name for name in vtts_rt.__all__ if name != "__version__")
    lines = [f"{k}{inspect.signature(f)}" for name in names for k, f in functions(name)]  # type: ignore[arg-type]
    options = AskOptions.__annotations__.items()
    return [*lines, *(f"AskOptions.{name}: {hint.__forward_arg__}" for name, hint in options)]


def test_public_signatures_are_as_filed() -> None:
    assert signatures() == SNAPSHOT.read_text().splitlines()


def test_nothing_public_takes_or_returns_anything() -> None:
    public = [
        line
        for line in signatures()
        if not re.match(r"\w+\.(as_dict|of_recipe|given|resolve)", line)
    ]
    assert not [line for line in public if re.search(r"\bAny\b", line)]


if __name__ == "__main__":
    print("\n".join(signatures()))
