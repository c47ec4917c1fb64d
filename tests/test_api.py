"""docs/api.md is what the code says: public signatures and docstrings.

After a change that is meant: `python tests/test_api.py > docs/api.md`.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import vtts_rt
from vtts_rt.rounds.ask import AskOptions

PAGE = Path(__file__).resolve().parents[1] / "docs" / "api.md"
HEAD = """# API

What `from vtts_rt import ...` gives, generated from signatures and docstrings by
`python tests/test_api.py > docs/api.md`. Every function that asks takes the keyword arguments
`AskOptions`, which are the fields of `Ask` behind `question`.
"""


def members(value: type) -> Iterator[tuple[str, Any]]:
    """The public functions and properties that a class defines itself."""
    for name, member in vars(value).items():
        if name.startswith("_"):
            continue
        if isinstance(member, classmethod | staticmethod | property) or inspect.isfunction(member):
            yield name, member if isinstance(member, property) else getattr(value, name)


def signature(name: str, function: Any) -> str:
    """As it is called, a parameter a line where that is long."""
    if isinstance(function, property):
        return f"{name}: {inspect.signature(function.fget).return_annotation}"
    called = inspect.signature(function)
    if inspect.isclass(function):
        called = called.replace(return_annotation=called.empty)
    line = unquoted(f"{name}{called}")
    if len(line) <= 96:
        return line
    end = "" if called.return_annotation is called.empty else f" -> {called.return_annotation}"
    before, parameters = "", []
    for parameter in called.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not before:
            before = "*"
            parameters.append("*")
        parameters.append(str(parameter))
    inner = "".join(f"    {parameter},\n" for parameter in parameters)
    return unquoted(f"{name}(\n{inner}){end}")


def unquoted(text: str) -> str:
    """Without the quotes of annotations that are texts."""
    return re.sub(r"(: |-> )'([^']*)'", r"\1\2", text)


def section(name: str, value: Any, level: str = "##") -> Iterator[str]:
    built = inspect.isclass(value) and "__init__" not in vars(value)
    protocol = getattr(value, "_is_protocol", False)
    told = f"class {name}" if built or protocol else signature(name, value)
    yield f"{level} {name}\n\n```python\n{told}\n```\n"
    if text := inspect.getdoc(value):
        yield f"```text\n{text}\n```\n"
    if inspect.isclass(value):
        for attribute, member in members(value):
            yield from section(f"{name}.{attribute}", member, "###")


def page() -> str:
    names = sorted(name for name in vtts_rt.__all__ if name != "__version__")
    parts = [part for name in names for part in section(name, getattr(vtts_rt, name))]
    hints = (f"{k}: {v.__forward_arg__}" for k, v in AskOptions.__annotations__.items())
    options = "## AskOptions\n\n```python\n" + "\n".join(hints) + "\n```\n"
    return "\n".join([HEAD, *parts, options])


def test_the_page_is_up_to_date() -> None:
    assert page() == PAGE.read_text(encoding="utf-8")


def test_nothing_public_takes_or_returns_anything() -> None:
    """But for what is written to and read from JSON."""
    json = re.compile(
        r"\w+\.(as_dict|of_recipe|given|resolve|(load_|check_)?state(_dict)?|stats)\b"
    )
    told = re.findall(r"^```python\n(.*?)^```$", page(), re.DOTALL | re.MULTILINE)
    assert len(told) > 60
    assert not [t for t in told if re.search(r"\bAny\b", t) and not json.match(t)]


if __name__ == "__main__":
    print(page(), end="")
