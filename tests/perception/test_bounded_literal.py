"""Python literals, read with a bound on their depth: what hides depth and what does not."""

from __future__ import annotations

import ast

import pytest

from vtts_rt.perception.published import MAX_CHARS, bounded_literal


@pytest.mark.parametrize(
    "hostile",
    [
        "','" + "-','" * 15_000,
        "['" + "]" * 900 + "'," + "[" * 190 + "]" * 191,
        "[']'," * 150 + "]" * 150,
        '(".",-' * 150 + ")" * 150,
        "[#]\n" * 100 + "[" * 90 + "]" * 190,
        "[#]\r" * 150 + "]" * 150,
        "['\\\r\n]'," * 150 + "]" * 150,
        "['\\']'," * 150 + "]" * 150,
        "['''\\''']'''," * 150 + "]" * 150,
        "['a' f'{[[1]]}']",
    ],
    ids=lambda text: text[:6],
)
def test_texts_and_comments_hide_no_depth(hostile: str) -> None:
    with pytest.raises(ValueError, match="too deep for a literal|letters before a text"):
        bounded_literal(hostile)


@pytest.mark.parametrize(
    "literal",
    [
        "[(1.5, 2.5), (3.5, 4.5), (5.5, 6.5)] # I looked here ... (or there ----)",
        "['" + "(" * 200 + "', b'--------------', r\".....\\\".....\", '''[\n]''', u\"# not in\"]",
        "[1, # [[\r2] # '",
    ],
)
def test_texts_and_comments_may_hold_anything(literal: str) -> None:
    assert bounded_literal(literal) == ast.literal_eval(literal)


def test_texts_that_never_close_are_read_once() -> None:
    """In time linear in the text: of one that is not, this would take minutes."""
    for piece in ("'''\\", "'", '"\\\n', "'\\'''", "aB", "#'"):
        with pytest.raises((ValueError, SyntaxError)):
            bounded_literal((piece * MAX_CHARS)[:MAX_CHARS])
