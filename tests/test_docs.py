"""Documents stay true: links resolve, commands, files and names exist, examples run."""

from __future__ import annotations

import pkgutil
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torchvision_shim

from vtts_rt import cli
from vtts_rt.data.needle import write_needle
from vtts_rt.data.rows import DataSet, write_manifest, write_rows

torchvision_shim.install()  # TRL's trainer, a name in docs, imports it
ROOT = Path(__file__).resolve().parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def code_blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_resolve(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_anchors_of_links_are_headings(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    missing = []
    for link, anchor in re.findall(r"\]\(([^)#:]*)#([^)]*)\)", text):
        there = (page.parent / link).read_text(encoding="utf-8") if link else text
        if anchor not in map(slug, re.findall(r"^#+ (.*)$", there, re.MULTILINE)):
            missing.append(f"{link}#{anchor}")
    assert not missing


def test_the_changelog_has_each_kind_of_change_once() -> None:
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    _, *versions = re.split(r"^## ", text, flags=re.MULTILINE)
    assert versions
    for version in versions:
        found = re.findall(r"^### (.*)$", version, re.MULTILINE)
        assert len(found) == len(set(found)) and kinds.issuperset(found), version[:20]


def code_spans(text: str) -> list[str]:
    text = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]


def commands() -> list[str]:
    """Every `vtts-rt ...` and `bench ...` of all pages, comments off."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        lines = "\n".join(code_blocks(text, "sh")).replace("\\\n", " ").splitlines()
        found += [line.split(" #")[0].strip() for line in lines] + code_spans(text)
    named = (re.sub("^bench ", "vtts-rt bench ", line) for line in found)
    return sorted({line for line in named if line.startswith("vtts-rt ")})


@pytest.mark.parametrize("command", commands())
def test_commands_have_their_flags(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = shlex.split(command)[1:]
    names = words[:1]
    if words[0] in (
        "bench",
        "data",
        "eval",
        "train",
    ):  # these have sub-commands with flags of their own
        names = [word for word in words[:2] if not word.startswith("--")]
    assert cli.main([*names, "--help"]) == 0
    usage = capsys.readouterr().out
    unknown = [word for word in words if word.startswith("--") and word not in usage]
    assert not unknown


# A changelog also names what is gone.
TRUE_TODAY = [page for page in PAGES if page.name != "CHANGELOG.md"]


@pytest.mark.parametrize("page", TRUE_TODAY, ids=lambda page: page.name)
def test_files_that_are_named_exist(page: Path) -> None:
    """Those with a folder: of the checkout, of the package, or of the C interface's headers."""
    path = r"(?<![\w/.<>$-])((?:[\w-]+/)+[\w.-]+\.(?:py|sh|cuh?|cpp|h|txt|json|mp4|md))\b"
    homes = [ROOT, ROOT / "vtts_rt", ROOT / "csrc/include", page.parent]
    named = re.findall(path, page.read_text(encoding="utf-8"))
    assert not [name for name in named if not any((home / name).exists() for home in homes)]


@pytest.mark.parametrize("page", TRUE_TODAY, ids=lambda page: page.name)
def test_dotted_names_exist(page: Path) -> None:
    for span in code_spans(page.read_text(encoding="utf-8")):
        for name in re.findall(r"(?<![\w/-])vtts_rt(?:\.[A-Za-z]\w+)+", span):
            if not name.endswith(".py"):
                pkgutil.resolve_name(name)


def test_each_change_has_code_tests_and_a_page() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    _, section = page.split("## Where do I change what\n")
    rows = [
        line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| a")
    ]
    subjects = [subject.split()[1] for subject, *_ in rows]
    assert subjects == ["family", "dialect", "strategy", "op", "decoder", "metric"]
    for _, code, tests, reference in rows:
        assert re.search("`(vtts_rt|kernels|csrc)/", code) and "`tests/" in tests
        assert re.fullmatch(r"\[[\w.]+\]\([\w.#-]+\)", reference)


def test_make_targets_exist() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = set(re.findall(r"^make ([a-z-]+)|`make ([a-z-]+)`", text, re.MULTILINE))
    missing = [a or b for a, b in named if not re.search(rf"^{a or b}:", makefile, re.MULTILINE)]
    assert not missing


def test_the_examples_on_the_first_page_run() -> None:
    """As a reader would run them: in the checkout, whose root is then on sys.path."""
    example = "\n".join(code_blocks(README, "python"))
    done = subprocess.run(
        [sys.executable, "-c", example], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.strip().splitlines()) == 6, done.stdout


@pytest.mark.slow
def test_the_example_of_the_feed_runs(tmp_path: Path) -> None:
    rows = write_needle(tmp_path, seed=0, num=1)
    write_rows(tmp_path / "rows.json", rows[:2])
    write_manifest(
        tmp_path / "manifest.json", [DataSet("needle", "video", "mc", Path(), Path("rows.json"))]
    )
    page = (ROOT / "docs" / "feed.md").read_text(encoding="utf-8")
    (example,) = code_blocks(page, "python")
    check = "\nassert len(group) == 8 and set(rewards) <= {0.0, 1.0}"
    check += "\nassert all(answer.rounds[0].reuse.frames_decoded == 0 for answer in group)"
    done = subprocess.run(
        [sys.executable, "-c", example + check],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
