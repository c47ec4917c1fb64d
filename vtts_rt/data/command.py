"""`vtts-rt data stats | check | convert | needle`: rows and manifests on the command line."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vtts_rt.checks import CommandParser
from vtts_rt.data.needle import SPLITS
from vtts_rt.data.rows import (
    TASKS,
    BadRow,
    BadRows,
    DataSet,
    OnBad,
    read_manifest,
    scan_manifest,
    sift,
    write_manifest,
    write_rows,
)
from vtts_rt.types import require


def _parser() -> argparse.ArgumentParser:
    from vtts_rt.data.converters import CONVERTERS

    parser = CommandParser(prog="vtts-rt data", description="Rows and manifests of training data.")
    commands = parser.add_subparsers(dest="command", required=True)
    manifest: dict[str, Any] = {"type": Path, "metavar": "MANIFEST"}
    as_json: dict[str, Any] = {"action": "store_true", "help": "one JSON object on stdout"}
    skip_bad: dict[str, Any] = {
        "action": "store_true",
        "help": "leave out rows that cannot be taken, and count them",
    }

    stats = commands.add_parser("stats", help="what the rows of a manifest hold")
    stats.add_argument("manifest", **manifest)
    stats.add_argument("--skip-bad", **skip_bad)
    stats.add_argument("--json", **as_json)
    stats.set_defaults(run=_stats)

    check = commands.add_parser(
        "check", help="every row that is wrong, has no media to open or does not serve its task"
    )
    check.add_argument("manifest", **manifest)
    check.add_argument("--json", **as_json)
    check.set_defaults(run=_check)

    formats = "; ".join(f"{name}: {c.about}" for name, c in CONVERTERS.items())
    convert = commands.add_parser(
        "convert", help="rows of public annotations", description=formats.replace("%", "%%")
    )
    convert.add_argument("format", choices=list(CONVERTERS))
    convert.add_argument("input", type=Path, metavar="IN", help="file or folder of annotations")
    convert.add_argument("output", type=Path, metavar="OUT", help="rows, .json or .jsonl")
    convert.add_argument("--media-name", metavar="NAME", help="such as {id}.mp4, of a row's file")
    convert.add_argument("--manifest", type=Path, help="manifest to which the rows are added")
    convert.add_argument("--media", type=Path, metavar="DIR", help="media folder, for --manifest")
    convert.add_argument(
        "--clips", type=Path, metavar="DIR", help="got10k: encode each sequence to a video here"
    )
    convert.add_argument("--skip-bad", **skip_bad)
    convert.set_defaults(run=_convert)

    needle = commands.add_parser(
        "needle", help="a balanced set of generated clips and pictures of each task"
    )
    needle.add_argument("output", type=Path, metavar="OUT", help="folder")
    needle.add_argument("--per-task", type=int, default=100, metavar="N", help="rows of each task")
    needle.add_argument("--seed", type=int, default=0, metavar="S", help="of the first scene (0)")
    needle.add_argument("--split", choices=SPLITS, default="train")
    needle.add_argument("--tasks", metavar="T,...", help=f"of {', '.join(TASKS)} (all)")
    needle.set_defaults(run=_needle)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """`vtts-rt data`; argv without the program's name. Returns the exit status: 2 where rows were
    refused, each of them a line on stderr."""
    args = _parser().parse_args(argv)
    try:
        return int(args.run(args))
    except BadRows as error:
        return tell_bad("data", error)


def tell_bad(command: str, error: BadRows) -> int:
    """Every refused row on stderr; the exit status."""
    for bad in error.bad:
        print(bad, file=sys.stderr)
    told = f"{len(error.bad)} bad (--skip-bad leaves them out)"
    print(f"vtts-rt {command}: {told}", file=sys.stderr)
    return 2


def _on_bad(args: argparse.Namespace) -> OnBad:
    return "skip" if args.skip_bad else "raise"


def _stats(args: argparse.Namespace) -> int:
    from vtts_rt.data.statistics import statistics

    entries, bad_entries = sift(scan_manifest(args.manifest), _on_bad(args))
    rows, bad_rows = sift(
        (
            item if isinstance(item, BadRow) else (entry, *item)
            for entry in entries
            for item in entry.scan()
        ),
        _on_bad(args),
    )
    require("data stats", "manifest", str(args.manifest), bool(rows), "one with rows")
    sets, total = statistics(rows)
    skipped = [str(bad) for bad in bad_entries + bad_rows]
    if args.json:
        result = {name: found.as_dict() for name, found in sets.items()}
        print(json.dumps({"sets": result, "total": total.as_dict(), "skipped": skipped}))
        return 0
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    media = Table("", "task", "rows", "files", "missing", "video s", box=None)
    labels = Table("", "options", "answers", "boxes", "span s", "of video", box=None)
    for name, found in (*sets.items(), *([("all", total)] if len(sets) > 1 else [])):
        told = found.as_dict()
        task = _counts(found.tasks) if found is not total else ""
        counts = (f"{told[key]:,}" for key in ("rows", "files", "files_missing"))
        media.add_row(escape(name), task, *counts, _median(told["duration_seconds"]))
        groups = (_counts(group) for group in (found.options, found.answers, found.boxes))
        spans = (_median(told[key]) for key in ("span_seconds", "span_shares"))
        labels.add_row(escape(name), *groups, *spans)
    console = Console()
    for table in (media, labels):
        console.print(table, "")
    console.print("rows by what they hold; medians of seconds and shares; --json has all")
    if skipped:
        console.print(f"{len(skipped)} skipped", highlight=False)
    return 0


def _median(spread: dict[str, float] | None) -> str:
    return "-" if spread is None else f"{spread['median']:.3g}"


def _counts(counts: Counter[Any]) -> str:
    """`4:12` for twelve rows with four; what is the same for all alone."""
    if len(counts) == 1:
        return str(next(iter(counts)))
    return " ".join(f"{name}:{counts[name]:,}" for name in sorted(counts))


def _check(args: argparse.Namespace) -> int:
    from vtts_rt.data.frames import check_openable

    sets: list[DataSet] = []
    bad: list[BadRow] = []
    num_rows = 0
    for entry in scan_manifest(args.manifest):
        bad.append(entry) if isinstance(entry, BadRow) else sets.append(entry)
    for entry in sets:
        try:
            for item in check_openable(list(entry.placed(validate=True))):
                num_rows += 1
                if isinstance(item, BadRow):
                    bad.append(item)
        except OSError as error:
            bad.append(BadRow(args.manifest, f"entry {entry.name}", f"{entry.json_path}: {error}"))
        except ValueError as error:
            bad.append(BadRow(args.manifest, f"entry {entry.name}", str(error)))
    if not (num_rows or bad):
        bad.append(BadRow(args.manifest, "whole", "manifest: rows must be at least one, got none"))
    if args.json:
        told = [{"path": str(b.path), "place": b.place, "error": b.error} for b in bad]
        print(json.dumps({"sets": len(sets), "rows": num_rows, "bad": told}))
    else:
        for one in bad:
            print(one)
        print(f"{len(sets)} sets, {num_rows:,} rows, {len(bad):,} bad")
    return 1 if bad else 0


def _convert(args: argparse.Namespace) -> int:
    from vtts_rt.data.converters import CONVERTERS, convert, encode_sequence

    both = (args.manifest is None) == (args.media is None)
    require("data convert", "--media", args.media, both, "given with --manifest, and only then")
    sequences = args.format == "got10k" and args.input.is_dir()
    ok = args.clips is None or sequences
    require("data convert", "--clips", args.clips, ok, "given with a folder of got10k only")
    rows, bad = sift(convert(args.format, args.input, args.media_name), _on_bad(args))
    require("data convert", "IN", str(args.input), bool(rows), "annotations with rows")
    kept = read_manifest(args.manifest) if args.manifest and args.manifest.exists() else []
    converter = CONVERTERS[args.format]
    write_rows(args.output, rows)
    if args.clips is not None:
        media_name = args.media_name or converter.media_name
        folders = {media_name.replace("{id}", path.name): path for path in args.input.iterdir()}
        for row in rows:
            clip = args.clips / row.media
            clip.parent.mkdir(parents=True, exist_ok=True)
            encode_sequence(folders[row.media], clip)
    if args.manifest is not None:
        kinds = converter.media_type, converter.task_type
        new = DataSet(args.output.stem, *kinds, args.media, args.output)
        sets = [*(entry for entry in kept if entry.name != new.name), new]
        write_manifest(args.manifest, [_absolute(entry) for entry in sets])
    print(f"{args.output}: {len(rows):,} rows, {len(bad):,} skipped", file=sys.stderr)
    return 0


def _absolute(entry: DataSet) -> DataSet:
    base, rows = entry.visual_base.absolute(), entry.json_path.absolute()
    return replace(entry, visual_base=base, json_path=rows)


def _needle(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import Progress

    from vtts_rt.data.needle_tasks import write_balanced

    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("scenes", total=args.per_task)
        manifest = write_balanced(
            args.output,
            args.seed,
            args.per_task,
            args.split,
            tasks=list(TASKS) if args.tasks is None else args.tasks.split(","),
            progress=lambda done, of: bar.update(task, completed=done, total=of),
        )
    print(manifest)
    return 0
