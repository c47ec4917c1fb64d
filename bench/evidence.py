"""Kinds of evidence for lines of the acceptance list.

Each check looks at this checkout and says PASS, FAIL or NOT RUN, with what it saw. Evidence that is
missing is NOT RUN, never PASS.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import targets

from vtts_rt.report import load_results

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


def tests(*selected: str, marks: str = "") -> Check:
    """Passes if every one of the pytest files or node ids exists, runs and passes.

    marks: as pytest's -m, where some of them are no part of the line. A skipped test is evidence
    for nothing, so a selection that skips is NOT RUN.
    """

    def check(_: argparse.Namespace) -> Verdict:
        missing = [name for name in selected if not (ROOT / name.split("::")[0]).exists()]
        if missing:
            return Verdict(NOT_RUN, f"no such test: {', '.join(missing)}")
        with tempfile.TemporaryDirectory() as folder:
            xml = Path(folder) / "tests.xml"
            done = _run([_script("pytest"), *selected, "-m", marks, f"--junitxml={xml}"])
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
