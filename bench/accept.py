"""`make accept`: one line, PASS, FAIL or NOT RUN, for each line of the acceptance list.

A line passes only on evidence seen in this run: tests that ran and passed, a number read from a
result file, a command that did what it should. Evidence that is missing is NOT RUN, never PASS.
Exit status: 1 if a line failed, 0 otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from vtts_rt.report import load_results

sys.path.append(str(Path(__file__).resolve().parent))
import targets

ROOT = Path(__file__).resolve().parents[1]
PASS, FAIL, NOT_RUN = "PASS", "FAIL", "NOT RUN"


class Verdict(NamedTuple):
    status: str
    evidence: str


Check = Callable[[argparse.Namespace], Verdict]


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the acceptance list and the checks that together decide it."""

    issue: int
    text: str
    checks: tuple[Check, ...]


# -- kinds of evidence ------------------------------------------------------------------------


def tests(*selected: str) -> Check:
    """Passes if every one of the pytest files or node ids exists, runs and passes.

    A skipped test is evidence for nothing, so a selection that skips is NOT RUN.
    """

    def check(_: argparse.Namespace) -> Verdict:
        missing = [name for name in selected if not (ROOT / name.split("::")[0]).exists()]
        if missing:
            return Verdict(NOT_RUN, f"no such test: {', '.join(missing)}")
        with tempfile.TemporaryDirectory() as folder:
            xml = Path(folder) / "tests.xml"
            done = _run([_script("pytest"), *selected, f"--junitxml={xml}"])
            return tests_verdict(done.returncode, _count(xml), " ".join(selected))

    return check


def tests_verdict(returncode: int, counts: dict[str, int], selected: str) -> Verdict:
    """What one pytest run says; counts: tests, failures, errors, skipped."""
    broken = counts["failures"] + counts["errors"]
    if broken or (counts["tests"] and returncode not in (0, 5)):
        return Verdict(FAIL, f"{broken} of {counts['tests']} tests fail: {selected}")
    if counts["skipped"]:
        return Verdict(NOT_RUN, f"{counts['skipped']} of {counts['tests']} skipped: {selected}")
    if returncode or not counts["tests"]:
        return Verdict(NOT_RUN, f"nothing collected: {selected}")
    return Verdict(PASS, f"{counts['tests']} tests")


def _count(xml: Path) -> dict[str, int]:
    counts = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
    if xml.exists():
        for suite in ET.parse(xml).getroot().iter("testsuite"):
            for name in counts:
                counts[name] += int(suite.get(name, 0))
    return counts


def measured(
    theme: str, judge: Callable[[dict[str, Any]], tuple[bool, str]], *, gpu: bool = False
) -> Check:
    """Judges the newest result of each hardware in bench/results (--results); all must pass.

    gpu: of each GPU, and of nothing else.
    """

    def check(args: argparse.Namespace) -> Verdict:
        results = load_results(args.results or ROOT / "bench" / "results", theme)
        if gpu:
            results = [result for result in results if result.data["hardware"].get("gpu")]
        if not results:
            where = "of a GPU" if gpu else ""
            return Verdict(NOT_RUN, f"no bench/results/{theme}_*.json {where}".strip())
        try:
            judged = [(result.path.name, *judge(result.data)) for result in results]
        except (LookupError, ValueError) as error:
            return Verdict(NOT_RUN, f"bench/results/{theme}_*.json lacks {error}")
        status = PASS if all(ok for _, ok, _ in judged) else FAIL
        return Verdict(status, "; ".join(f"{said} ({name})" for name, _, said in judged))

    return check


def _run(
    command: Sequence[str], cwd: Path | None = None, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run in `cwd`, by default the checkout, with `env` added to the environment."""
    return subprocess.run(
        command, cwd=cwd or ROOT, env={**os.environ, **env}, capture_output=True, text=True
    )


# -- issue 2: the loop on a real video, end to end --------------------------------------------


def fresh_clone(args: argparse.Namespace) -> Verdict:
    """Clone HEAD, then `make ask` and `make test` in it, each twice: the second reuses."""
    if not args.fresh_clone:
        return Verdict(NOT_RUN, "add --fresh-clone (minutes)")
    clip = json.loads((ROOT / "vtts_rt" / "assets" / "clip.json").read_text())
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "clone"
        done = _run(["git", "clone", "-q", str(ROOT), str(clone)])
        if done.returncode:
            return Verdict(FAIL, done.stderr.strip()[-200:])
        for goal in ("ask", "ask", "test", "test"):
            done = _run(["make", goal], cwd=clone)
            if done.returncode:
                return Verdict(FAIL, f"make {goal}: {(done.stdout + done.stderr).strip()[-200:]}")
            if goal == "ask" and not done.stdout.strip().splitlines()[-1].startswith(
                clip["answer"]
            ):
                return Verdict(FAIL, f"make ask answered {done.stdout.strip()[-100:]!r}")
    return Verdict(PASS, "make ask and make test, each twice, in a clone of HEAD")


def light_environment(_: argparse.Namespace) -> Verdict:
    """The shipped clip is answered, rightly, where neither triton nor DALI can be imported."""
    assets = ROOT / "vtts_rt" / "assets"
    if not (assets / "clip.json").exists() or not (assets / "clip.mp4").exists():
        return Verdict(NOT_RUN, "no clip in vtts_rt/assets")
    clip = json.loads((assets / "clip.json").read_text())
    words = [word for text in clip["options"] for word in ("--option", text)]
    with tempfile.TemporaryDirectory() as folder:
        for name in ("triton", "nvidia"):
            (Path(folder) / f"{name}.py").write_text(f"raise ImportError('{name} is hidden')\n")
        ask = [str(assets / "clip.mp4"), clip["question"], *words, "--json"]
        done = _run([_script("vtts-rt"), "ask", *ask], PYTHONPATH=folder)
    if done.returncode:
        return Verdict(FAIL, done.stderr.strip()[-200:])
    answer = json.loads(done.stdout)
    said = f"said {answer['option']}, label {clip['answer']}"
    seconds = answer["timings_ms"]["total"] / 1e3
    right = answer["option"] == clip["answer"]
    return Verdict(PASS if right else FAIL, f"{said}, {seconds:.1f} s, triton and DALI hidden")


def fresh_needle(args: argparse.Namespace) -> Verdict:
    """The needle bar on a seed given now."""
    if args.needle_seed is None:
        return Verdict(NOT_RUN, "add --needle-seed S (minutes)")
    command = [_script("vtts-rt"), "eval", "needle", "--seed", str(args.needle_seed)]
    done = _run([*command, "--num", str(args.needle_num), "--rounds", "1,2,3", "--json"])
    if done.returncode:
        return Verdict(FAIL, done.stderr.strip()[-200:])
    ok, said = targets.needle_bar({"num": args.needle_num, **json.loads(done.stdout)})
    return Verdict(PASS if ok else FAIL, f"{said}, seed {args.needle_seed}")


def readme_command(_: argparse.Namespace) -> Verdict:
    """README's `bench rounds --peer hf`, cut to one short round so that it takes a minute."""
    readme = ROOT / "README.md"
    texts = readme.read_text(encoding="utf-8").splitlines() if readme.exists() else []
    said = [text for text in texts if text.startswith("vtts-rt bench rounds --peer hf")]
    if not said:
        return Verdict(NOT_RUN, "README names no such command")
    line = said[0].split("#")[0].split()
    short = ["--peer", "hf", "--rounds", "1", "--max-tokens", "2", "--repeats", "1"]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        done = _run([_script("vtts-rt"), *line[1:], *short, "--output-json", str(out)])
        if done.returncode:
            return Verdict(FAIL, done.stderr.strip()[-200:])
        names = list(json.loads(out.read_text())["contenders"])
    return Verdict(PASS, f"{' '.join(line)}: {', '.join(names)}")


def documented(name: str, *wanted: str) -> Check:
    """Passes if a document holds all of these."""

    def check(_: argparse.Namespace) -> Verdict:
        path = ROOT / "docs" / name
        if not path.exists():
            return Verdict(NOT_RUN, f"no docs/{name}")
        text = path.read_text(encoding="utf-8")
        missing = [part for part in wanted if part not in text]
        if missing:
            return Verdict(FAIL, f"docs/{name} lacks {missing[0]!r}")
        return Verdict(PASS, f"docs/{name}")

    return check


def _script(name: str) -> str:
    """A console script of the environment that runs this file."""
    found = shutil.which(name, path=str(Path(sys.executable).parent))
    if found is None:
        raise RuntimeError(f"accept: {name} is missing here; run `make accept`")
    return found


# Tests of Triton kernels in the interpreter; others of an op need a GPU or another processor.
INTERPRETED = [
    f"{path.relative_to(ROOT).as_posix()}::{name}"
    for path in sorted((ROOT / "tests" / "ops").glob("test_*.py"))
    for name in re.findall(
        r"^def (test_\w+_under_the_interpreter)\(", path.read_text(), re.MULTILINE
    )
]

LINES = (
    Line(
        2,
        "fresh clone: `make ask` answers on the shipped clip, `make test` passes, both reuse",
        (light_environment, fresh_clone),
    ),
    Line(
        2,
        "logits equal transformers' on four tiny configurations to 1e-4 in fp32",
        (tests("tests/models/test_parity.py::test_logits_equal_transformers"),),
    ),
    Line(
        2,
        "`official` with hf5 is token for token the transformers loop, 3 rounds",
        (tests("tests/test_official_parity.py"),),
    ),
    Line(
        2,
        "`append` decodes, encodes and prefills only what is new; logits equal one full prefill",
        (
            tests(
                "tests/test_runtime.py::test_append_pays_only_for_what_is_new",
                "tests/engine/test_engine.py::test_an_appended_round_prefills_only_what_is_new",
            ),
        ),
    ),
    Line(
        2,
        "three rounds of `append` take at most half the time of the loop",
        (measured("rounds", targets.append_time),),
    ),
    Line(
        2,
        "patchify at least 3x transformers' processor, 32 frames of 1280x720, 2 threads",
        (measured("patchify", targets.patchify_speed),),
    ),
    Line(
        2,
        "needle: three rounds at least 30 points above one, one at most 45 %, fresh seeds",
        (
            tests("tests/data/test_needle.py::test_the_coarse_pass_cannot_be_read"),
            measured("needle", targets.needle_bar),
            fresh_needle,
        ),
    ),
    Line(
        3,
        "at least 200 random interleavings, every output that of the request alone",
        (tests("tests/engine/test_interleavings.py"),),
    ),
    Line(
        3,
        "three rounds: 2.5x the loop on transformers and on vLLM, 1.5x vLLM in our layout",
        (measured("rounds", targets.beats_peers), measured("rounds", targets.has_command)),
    ),
    Line(
        3,
        "five rounds: 4x the loop on transformers",
        (measured("rounds5", targets.five_rounds), measured("rounds5", targets.has_command)),
    ),
    Line(3, "one round within 10 % of vLLM's time", (measured("rounds", targets.first_round),)),
    Line(
        3,
        "the same question again decodes and encodes nothing, prefills less than a page",
        (
            measured("rounds", targets.asked_again),
            tests("tests/test_runtime.py::test_the_same_question_again_costs_nothing"),
        ),
    ),
    Line(
        3,
        "8 askers on one video take at most a third of 8 separate runs",
        (measured("onevideo", targets.one_video), measured("onevideo", targets.has_command)),
    ),
    Line(
        3,
        "1,000 mixed requests: memory grows by less than 1 MB per 100 and stays under budget",
        (measured("soak", targets.steady_memory), measured("soak", targets.has_command)),
    ),
    Line(
        3,
        "two videos never share a key; faults end their own request",
        (
            tests("tests/test_keys.py", "tests/engine/test_scheduler.py"),
            tests("tests/test_concurrency.py"),
        ),
    ),
    Line(3, "`vtts-rt bench rounds --peer hf` runs as README says", (readme_command,)),
    Line(
        3,
        "docs: the life of a request in eight steps, what each key holds, strategies compared",
        (
            documented(
                "architecture.md", "## The life of a request", "\n8. ", "## What a cache key"
            ),
            documented("strategies.md", "Generated from `strategies_"),
        ),
    ),
    Line(
        4,
        "the C interface: golden vectors, differential fuzzing, C99, wheel, examples bit for bit",
        (tests("tests/csrc", "tests/test_wheel.py"),),
    ),
    Line(
        4,
        "every Triton kernel in the interpreter; all compiled for three GPUs, no spill unexplained",
        (tests("tests/test_kernels.py", *INTERPRETED),),
    ),
    Line(
        4,
        "error tables by kernel and dtype are generated into docs/ops.md",
        (
            documented("ops.md", "Generated from `errors_"),
            tests(
                "tests/test_ops_complete.py::test_the_error_table_has_a_row_for_every_backend",
                "tests/test_report.py::test_the_tables_of_this_checkout_are_current",
            ),
        ),
    ),
    Line(
        4,
        "adding an op takes seven documented steps; every op has all its places under one name",
        (tests("tests/test_ops_complete.py"),),
    ),
    Line(
        4,
        "`vtts-rt env` prints every dispatch choice with its reason",
        (tests("tests/test_environment.py"),),
    ),
    Line(
        4,
        "CPU: patchify 4x transformers' processor, AVX2 4x scalar",
        (measured("patchify", targets.patchify_targets),),
    ),
    *(
        Line(4, f"GPU: {text}", (measured(theme, judge, gpu=True),))
        for text, theme, judge in (
            ("patchify at 60 % of copy bandwidth", "ops", targets.gpu_patchify),
            ("patchify 20x transformers' processor", "processor", targets.gpu_processor),
            ("patch_embed not slower than with cuBLAS", "ops", targets.gpu_patch_embed),
            ("a 7B token at 80 % of the floor", "decode7b", targets.gpu_decode),
            ("cascade 1.8x plain at G = 16, 32k", "ops", targets.gpu_cascade),
            ("three rounds 5x the loop at 7B shapes", "device7b", targets.gpu_rounds),
        )
    ),
)


# -- the list ---------------------------------------------------------------------------------


def judge(line: Line, args: argparse.Namespace) -> Verdict:
    """FAIL if a check failed, NOT RUN if one did not run, else PASS."""
    verdicts = [check(args) for check in line.checks]
    for status in (FAIL, NOT_RUN):
        said = [verdict.evidence for verdict in verdicts if verdict.status == status]
        if said:
            return Verdict(status, "; ".join(said))
    return Verdict(PASS, "; ".join(verdict.evidence for verdict in verdicts))


def main(argv: Sequence[str] | None = None, lines: Sequence[Line] = LINES) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--issue", type=int, help="only the lines of this issue")
    parser.add_argument("--only", default="", help="only lines that begin so")
    parser.add_argument("--results", type=Path, help="folder of result files")
    parser.add_argument("--fresh-clone", action="store_true", help="also build a fresh clone")
    parser.add_argument("--needle-seed", type=int, help="also evaluate needle on this seed")
    parser.add_argument("--needle-num", type=int, default=500, help="clips of that evaluation")
    args = parser.parse_args(argv)
    failed = False
    for line in lines:
        if args.issue in (None, line.issue) and line.text.startswith(args.only):
            verdict = judge(line, args)
            failed |= verdict.status == FAIL
            print(
                f"{verdict.status:8}issue {line.issue}: {line.text} [{verdict.evidence}]",
                flush=True,
            )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
