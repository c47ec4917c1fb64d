"""Tables of README and docs, written from the results of benches.

A table stands between `<!-- table:NAME -->` and `<!-- /table -->`; nothing between the two is
ever typed. Results are files `bench/results/<theme>_<hardware>_<yyyymm>.json`; of one theme and
hardware the newest counts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from report import answers, ops, training, videos
from report.results import Result, load_results
from vtts_rt.checks import CommandParser

__all__ = ["load_results", "main"]

_BLOCK = re.compile(r"(<!-- table:([\w-]+) -->\n).*?(<!-- /table -->)", re.DOTALL)
_TABLES = {**answers.TABLES, **ops.TABLES, **training.TABLES, **videos.TABLES}


def table(name: str, root: Path) -> str:
    """The text between the two markers of table `name` in the checkout `root`.

    Raises ValueError for an unknown name or a result that lacks a value the table needs.
    """
    if name not in _TABLES:
        known = ", ".join(_TABLES)
        raise ValueError(f"report: table must be one of {known}, got {name!r}")
    theme, render = _TABLES[name]
    results = load_results(root / "bench" / "results", theme)
    if not results:
        return f"No result of `{theme}` in bench/results yet.\n"
    parts = []
    for result in results:
        try:
            parts.append(f"\n{render(result)}\n{_source(result)}\n")
        except (KeyError, TypeError) as error:
            raise ValueError(f"report: {result.path} lacks a value: {error!r}") from None
    return "".join(parts)


def _source(result: Result) -> str:
    """One line: file, commit and versions behind a table."""
    data = result.data
    facts = [f"`{result.path.name}`"]
    if machine := data.get("hardware"):
        threads = f", {machine['threads']} threads" if "threads" in machine else ""
        facts.append(f"{machine.get('gpu') or machine['cpu']}{threads}")
    if commit := data.get("commit"):
        facts.append(f"commit {commit[:10]}{'+' if commit.endswith('+') else ''}")
    facts += [f"{name} {version}" for name, version in data.get("versions", {}).items()]
    return f"Generated from {', '.join(facts)}."


def update(text: str, root: Path) -> str:
    """`text` with every marked table rewritten from the checkout `root`."""
    return _BLOCK.sub(lambda block: f"{block[1]}{table(block[2], root)}{block[3]}", text)


def main(argv: Sequence[str] | None = None) -> int:
    """Rewrite the tables; with --check, only say which files are out of date (status 1)."""
    parser = CommandParser(prog="vtts-rt report", description=__doc__.split("\n")[0])
    parser.add_argument("--root", type=Path, default=Path(), help="a checkout (default: here)")
    parser.add_argument("--check", action="store_true", help="change nothing; 1 if out of date")
    args = parser.parse_args(argv)
    readme = args.root / "README.md"
    if not readme.is_file():
        raise ValueError(f"report: root must be a checkout with a README.md, got {args.root}")
    stale = []
    for path in (readme, *sorted((args.root / "docs").glob("*.md"))):
        before = path.read_text(encoding="utf-8")
        after = update(before, args.root)
        if after != before:
            stale.append(path)
            if not args.check:
                path.write_text(after, encoding="utf-8")
    for path in stale:
        print(f"{path}: {'out of date' if args.check else 'written'}")
    return 1 if args.check and stale else 0
