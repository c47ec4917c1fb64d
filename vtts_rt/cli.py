"""Command line: `vtts-rt ask | plan | env | bench | data | train | eval | report`.

Imports only what the chosen command needs. A user's mistake is one line on stderr and exit
status 2; a failure is one line and exit status 1; Ctrl-C is 130.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtts_rt import LOG_LEVELS, __version__
from vtts_rt.checkout import source_module
from vtts_rt.checks import CommandParser
from vtts_rt.config import PARITIES, QUANTIZATIONS, RUNNING_DIALECTS, STRATEGIES, MediaLimits
from vtts_rt.types import DECODERS, VIDEO_WRAPPERS, require

if TYPE_CHECKING:
    from vtts_rt.rounds.results import Answer
    from vtts_rt.runtime import Runtime


# command -> (module with a `main(argv)`, or its file in the checkout's bench/; help). They bring
# their own flags.
_DELEGATES = {
    "rollout": ("vtts_rt.rollout_command", "sample rollout groups of a manifest into a journal"),
    "bench": ("vtts_rt.bench", "measure; `vtts-rt bench --help` lists what"),
    "data": ("vtts_rt.data.command", "rows and manifests; `vtts-rt data --help` lists what"),
    "train": ("vtts_rt.train", "GRPO, and the embedded model; `vtts-rt train --help` lists what"),
    "eval": ("vtts_rt.evaluation.needle", "accuracy by round; `vtts-rt eval needle --help`"),
    "report": ("report/__init__.py", "write the tables of README and docs from results"),
}

_SWITCH: Any = {"action": "store_true", "default": None}  # None leaves it to the model


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(prog="vtts-rt", description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--version", action="version", version=f"vtts-rt {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    ask = commands.add_parser("ask", help="answer a question about a video in rounds")
    _question_flags(ask)
    unset = "if unset, the checkpoint's own"
    ask.add_argument("--temperature", type=float, metavar="T", help=f"0 is greedy; {unset}")
    ask.add_argument("--top-p", type=float, metavar="P", help=f"1 keeps all; {unset}")
    ask.add_argument("--top-k", type=int, metavar="K", help=f"0 keeps all; {unset}")
    ask.add_argument(
        "--repetition-penalty", type=float, metavar="P", help=f"of prompt and answer; {unset}"
    )
    ask.add_argument("--presence-penalty", type=float, metavar="P", help="of the answer, once")
    ask.add_argument("--frequency-penalty", type=float, metavar="P", help="of the answer, by count")
    ask.add_argument("--stop", action="append", metavar="TEXT", help="ends a round (repeat)")
    ask.add_argument("--seed", type=int, help="seed of the sampling noise (0)")
    ask.add_argument("--timeout-seconds", type=float, help="stop with what there is")
    ask.add_argument(
        "--constrain-clues",
        **_SWITCH,
        help="a grammar keeps every clue parseable (needs vtts_rt[grammar])",
    )
    ask.add_argument(
        "--draft-tokens",
        type=int,
        default=argparse.SUPPRESS,
        metavar="N",
        help="most tokens drafted from earlier rounds; 0: none (never changes the answer)",
    )
    ask.add_argument("--json", action="store_true", help="one JSON object on stdout")
    ask.add_argument("--ignore-eos", **_SWITCH, help="always --max-tokens (benches)")
    ask.add_argument(
        "--assume-clues",
        metavar="JSON",
        help='a clue per round: [[[s,e],...], {"spans":[[s,e]],"boxes":[[x0,y0,x1,y1]]}, ...]',
    )
    ask.set_defaults(run=_ask)

    plan = commands.add_parser("plan", help="frames, tokens and memory of a run before it")
    _question_flags(plan)
    plan.add_argument("--json", action="store_true", help="one JSON object on stdout")
    plan.set_defaults(run=_plan)

    env = commands.add_parser("env", help="what is installed, what was built, what is used")
    env.add_argument("--json", action="store_true", help="one JSON object on stdout")
    env.set_defaults(run=_env)

    for name, (_, text) in _DELEGATES.items():
        commands.add_parser(name, help=text, add_help=False)
    return parser


def _question_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("video", metavar="VIDEO", help="file of a video, an image or a .npy array")
    parser.add_argument("question", metavar="QUESTION")
    more: dict[str, Any] = {"action": "append", "default": []}
    parser.add_argument("--and-video", **more, metavar="FILE", help="a further video or image")
    parser.add_argument("--option", **more, metavar="TEXT", help="an answer to choose from")
    parser.add_argument("--context", metavar="FILE", help="subtitles or other text to read first")
    parser.add_argument("--model", default="tiny", help="tiny, a directory, or a hub id")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda[:n]")
    parser.add_argument("--quantization", choices=QUANTIZATIONS, help="8-bit weights")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (0: as they are)")
    parser.add_argument("--strategy", choices=STRATEGIES)
    parser.add_argument(
        "--dialect", choices=RUNNING_DIALECTS, help="how the model asks for another look (its own)"
    )
    parser.add_argument(
        "--rounds", dest="max_rounds", type=int, metavar="K", help="looks at the video"
    )
    parser.add_argument("--sample-fps", type=float, metavar="F")
    parser.add_argument("--max-frames", type=int, metavar="N")
    parser.add_argument("--total-pixels", type=int, metavar="N")
    parser.add_argument("--min-pixels", type=int, metavar="N")
    parser.add_argument(
        "--video-first",
        dest="text_first",
        action="store_false",
        default=None,
        help="refresh, append: the first look before the question, for many questions a video",
    )
    parser.add_argument(
        "--sticky-clues",
        **_SWITCH,
        help="official: a round without a clue looks where the last clue pointed",
    )
    parser.add_argument("--parity", choices=PARITIES, help="whose numbers are reproduced")
    parser.add_argument(
        "--video-wrapper", choices=VIDEO_WRAPPERS, help="markers around a video's pairs"
    )
    parser.add_argument("--prompts", metavar="FILE", help="JSON file with your own wording")
    parser.add_argument(
        "--source-fps", type=float, metavar="F", help="rate of a .npy array or a raw stream"
    )
    parser.add_argument("--start-seconds", type=float, help="the video begins here")
    parser.add_argument("--end-seconds", type=float, help="the video ends here")
    parser.add_argument(
        "--decoder", choices=DECODERS, default="auto", help="of video files (auto: see env)"
    )
    parser.add_argument(
        "--media-limit",
        action="append",
        default=[],
        type=_media_limit,
        metavar="NAME=N",
        help=f"another bound on a video: {', '.join(f.name for f in fields(MediaLimits))}",
    )
    parser.add_argument("--allow-urls", action="store_true", help="VIDEO may be a URL")
    parser.add_argument(
        "--max-tokens", type=int, metavar="N", help="per round (2048, cut to what fits)"
    )


def _media_limit(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    if name not in {f.name for f in fields(MediaLimits)}:
        raise argparse.ArgumentTypeError(f"{name!r} is no bound on a video")
    try:
        return name, float(value) if name.endswith("_seconds") else int(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{name} must be a number, got {value!r}") from None


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(format="%(name)s: %(message)s")
    try:
        level, levels = os.environ.get("VTTS_RT_LOG") or "warning", ", ".join(LOG_LEVELS)
        require("vtts-rt", "VTTS_RT_LOG", level, level.lower() in LOG_LEVELS, f"one of {levels}")
        logging.getLogger("vtts_rt").setLevel(level.upper())
        if arguments and arguments[0] in _DELEGATES:
            return _delegate(arguments[0], arguments[1:])
        parsed = _parser().parse_args(arguments)
        return int(parsed.run(parsed))
    except SystemExit as stop:  # argparse: --help, --version, a wrong flag
        return stop.code if isinstance(stop.code, int) else 1
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:
        # The reader went away; nothing more can be said on stdout.
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115
        return 1
    except ValueError as error:
        return _fail(error, 2)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        said = f"path must be of a file that is there, got {error.filename!r} ({error.strerror})"
        return _fail(said if error.filename else error, 2)
    except MemoryError:
        return _fail("out of memory; lower --total-pixels or --max-frames", 1)
    except Exception as error:
        logging.getLogger("vtts_rt").debug("traceback", exc_info=True)
        known = isinstance(error, (RuntimeError, OSError))
        return _fail(error if known else f"{type(error).__name__}: {error}", 1)


def _fail(error: object, status: int) -> int:
    print("vtts-rt: " + " ".join(str(error).split()), file=sys.stderr)
    return status


def _delegate(command: str, arguments: list[str]) -> int:
    """Hand the rest of the line to the module that implements the command."""
    name = _DELEGATES[command][0]
    if name.endswith(".py"):
        module = source_module(f"the parts of `vtts-rt {command}`", name)
    else:
        module = import_module(name)
    return int(module.main(arguments) or 0)


# -- ask, plan ------------------------------------------------------------------------------


def _runtime(args: argparse.Namespace) -> Runtime:
    from vtts_rt.config import EngineConfig, RuntimeConfig
    from vtts_rt.runtime import Runtime

    return Runtime.from_pretrained(
        args.model,
        dtype=args.dtype,
        device=args.device,
        quantization=args.quantization,
        engine=made_of(EngineConfig, args),
        config=made_of(RuntimeConfig, args),
    )


def _question(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments that `ask` and `plan` share."""
    from vtts_rt.config import PerceptionConfig

    return {
        "video": [args.video, *args.and_video],
        "question": args.question,
        "options": args.option,
        "context": "" if args.context is None else _read_text(args.command, args.context),
        "perception": made_of(PerceptionConfig, args),
        "limits": MediaLimits(**dict(args.media_limit)),
        **{n: getattr(args, n) for n in ("start_seconds", "end_seconds", "source_fps")},
        "allow_urls": args.allow_urls,
    }


def made_of(kind: type, args: argparse.Namespace) -> Any:
    """A configuration of the flags that have the names of its fields."""
    return kind(**{f.name: getattr(args, f.name) for f in fields(kind) if hasattr(args, f.name)})


def _read_text(command: str, path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{command}: context must be a readable UTF-8 file, got {path!r}: {error}"
        ) from error


def _ask(args: argparse.Namespace) -> int:
    from vtts_rt.types import SamplingParams

    question = _question(args)
    clues = None
    if args.assume_clues is not None:
        try:
            clues = json.loads(args.assume_clues)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"ask: --assume-clues must be JSON, got {error}") from None
        if not isinstance(clues, list):
            raise ValueError("ask: --assume-clues must be a list with one clue per round")
    with _Progress(enabled=not args.json) as progress, _runtime(args) as runtime:
        answer = runtime.ask(
            **question,
            sampling=made_of(SamplingParams, args),
            assume_clues=clues,
            timeout_seconds=args.timeout_seconds,
            on_event=progress.show,
        )
    if args.json:
        print(json.dumps(answer.as_dict()))
    else:
        _print_answer(answer, args.option)
    return 0


def _plan(args: argparse.Namespace) -> int:
    question = _question(args)
    with _runtime(args) as runtime:
        plan = runtime.plan(**question, max_tokens=args.max_tokens)
    if args.json:
        print(json.dumps(plan))
        return 0
    from rich.console import Console
    from rich.table import Table

    table = Table("", *(f"round {r['index'] + 1}" for r in plan["rounds"]))
    for name in ("frames", "pairs", "vision_tokens", "prompt_tokens"):
        cells = (f"{'' if r['exact'] else '~ '}{r[name]:,}" for r in plan["rounds"])
        table.add_row(name.replace("_", " "), *cells)
    console = Console()
    console.print(f"{plan['model']}, strategy {plan['strategy']}", highlight=False)
    console.print(table)
    memory = ", ".join(
        f"{name} {size / 2**20:,.1f} MiB" for name, size in plan["memory_bytes"].items()
    )
    console.print(f"memory: {memory}", highlight=False)
    return 0


def _print_answer(answer: Answer, options: Sequence[str]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Column, Table

    said = Column("said", overflow="fold")  # the others are short; this one is never cut
    table = Table("round", "looked at", said, "frames", "pairs", "tokens", "ms", box=None)
    for result in answer.rounds:
        times = result.plan.timestamps_seconds
        span = f"{min(times):.1f}-{max(times):.1f} s" if times else ""
        reuse = result.reuse
        table.add_row(
            str(result.index + 1),
            span,
            escape(result.text.strip()),
            f"{reuse.frames_decoded} new, {reuse.frames_reused} kept",
            f"{reuse.pairs_encoded} new, {reuse.pairs_reused} kept",
            f"{reuse.tokens_prefilled} new, {reuse.tokens_reused} kept",
            f"{result.timings.total:.0f}",
        )
    Console(stderr=True).print(table)
    for result in answer.rounds:
        if result.finish_reason == "length" and not result.answered:
            cut = f"round {result.index + 1} was cut at {len(result.token_ids)} tokens"
            Console(stderr=True).print(f"{cut} (--max-tokens) before its answer was complete")
    index = answer.option_index
    print(answer.text if index is None else f"{answer.option}. {options[index]}")
    Console(stderr=True).print(
        f"{answer.total_ms / 1e3:.2f} s, stopped: {answer.stop_reason}", style="dim"
    )


class _Progress:
    """What the model says while it says it, on a terminal only."""

    def __init__(self, enabled: bool) -> None:
        self._on = enabled and sys.stderr.isatty()
        self._status: Any = None
        self._text = ""

    def __enter__(self) -> _Progress:
        if self._on:
            from rich.console import Console

            self._status = Console(stderr=True).status("loading the model")
            self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._status is not None:
            self._status.stop()

    def show(self, event: Any) -> None:
        if self._status is None:
            return
        from rich.markup import escape

        if event.type == "round_started":
            self._text = f"round {event.index + 1}: {len(event.plan.frame_indices)} frames "
        elif event.type == "token":
            self._text += event.text
        self._status.update(escape(self._text[-200:]))


# -- env ------------------------------------------------------------------------------------


def _env(args: argparse.Namespace) -> int:
    from vtts_rt.environment import environment

    report = environment()
    if args.json:
        print(json.dumps(report))
        return 0
    for section, entries in report.items():
        print(f"{section}:")
        for name, value in entries.items():
            print(f"  {name}: {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
