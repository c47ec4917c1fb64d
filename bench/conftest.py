"""`pytest bench --benchmark-only`: the flags of the micro-benchmarks, and where modules are found.

The repository root must not be importable: its `kernels/` folder would shadow the PyPI package of
that name, which transformers may import.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != ROOT]
sys.path.append(str(ROOT / "bench"))


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("vtts_rt")
    group.addoption("--op", default="", help="ops, comma-separated; limits: of the machine")
    group.addoption("--device", choices=("cpu", "cuda"), help="default: a GPU where there is one")
    group.addoption("--dtype", help="default: bfloat16, on a CPU float32")
    group.addoption("--runs", type=int, default=25, help="timed runs of each backend")
    group.addoption("--threads", type=int, default=0, help="CPU threads; 0: torch's own number")
    group.addoption("--stream", action="store_true", help="what `isolated.outcomes` reads, with -s")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("stream"):
        config.pluginmanager.register(Stream())


class Stream:
    """Each benchmark as a JSON line on stdout, and each op that is done; a failure on stderr."""

    failed = False

    def pytest_runtest_teardown(self, item: pytest.Item, nextitem: pytest.Item | None) -> None:
        benchmark = getattr(item, "funcargs", {}).get("benchmark")
        if benchmark is not None and benchmark.stats is not None and not benchmark.has_error:
            self._say({"row": {**benchmark.extra_info, "median": benchmark.stats.stats.median}})
        op = self._op(item)
        last = nextitem is None or self._op(nextitem) != op
        if last and op is not None and not self.failed:
            self._say({"done": op})

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed = True
            crash = getattr(report.longrepr, "reprcrash", None)
            text = report.longreprtext if crash is None else crash.message
            sys.stdout.flush()
            print(" ".join(text.split()), file=sys.stderr, flush=True)

    def _op(self, item: pytest.Item) -> str | None:
        """None for the limits where they are not to be measured: pytest keeps a skipped test."""
        op = item.callspec.params["op"]  # type: ignore[attr-defined]
        return op if isinstance(op, str) else None

    def _say(self, words: dict[str, object]) -> None:
        print(f"\n{json.dumps(words)}", flush=True)  # the progress dots have no end of line
