from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vtts_rt.config import EngineConfig
from vtts_rt.engine import memory
from vtts_rt.engine.memory import available_bytes, kv_budget

CPU = torch.device("cpu")
MEMINFO = "MemTotal: 16000 kB\nMemFree: 1000 kB\nMemAvailable:   8000 kB\nHugePages_Total: 0\n"


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def available(root: Path) -> int:
    return available_bytes(root / "proc", root / "cgroup")


def test_a_budget_that_is_given_is_taken() -> None:
    assert kv_budget(EngineConfig(kv_bytes=12345), 100000, CPU) == 12345


def test_a_cpu_gives_an_eighth_of_what_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: 8000)
    assert kv_budget(EngineConfig(), 64, CPU) == 1000
    assert kv_budget(EngineConfig(), 4096, CPU) == 4096  # at least one page


def test_a_gpu_gives_four_fifths_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 5000))
    assert kv_budget(EngineConfig(), 64, torch.device("cuda", 0)) == 800


def test_this_machine_has_some_memory() -> None:
    assert 1 << 20 < available_bytes() < 1 << 50


def test_without_control_groups_the_kernel_is_believed(tmp_path: Path) -> None:
    write(tmp_path, {"proc/meminfo": MEMINFO})
    assert available(tmp_path) == 8000 << 10


@pytest.mark.parametrize("text", ["", "MemFree: 1 kB\n", "MemAvailable: ? kB\n", "MemAvailable:\n"])
def test_where_the_kernel_does_not_tell_half_the_machine_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    write(tmp_path, {"proc/meminfo": text})
    sizes = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1000}
    monkeypatch.setattr(memory.os, "sysconf", sizes.__getitem__)
    assert available(tmp_path) == 2048000
    monkeypatch.delattr(memory.os, "sysconf")  # not a Unix
    assert available(tmp_path) == 8 << 30


def test_the_tightest_group_above_the_process_counts(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "proc/meminfo": MEMINFO,
            "proc/self/cgroup": "0::/outer/inner\n",
            "cgroup/outer/memory.max": "3000000\n",
            "cgroup/outer/memory.current": "2500000\n",
            "cgroup/outer/memory.stat": "anon 2000000\ninactive_file 400000\n",
            "cgroup/outer/inner/memory.max": "max\n",
            "cgroup/outer/inner/memory.current": "2000000\n",
            "cgroup/outer/inner/memory.stat": "anon 2000000\n",
        },
    )
    assert available(tmp_path) == 900000


def test_a_group_over_its_limit_leaves_nothing(tmp_path: Path) -> None:
    files = {"max": "1000\n", "current": "2000\n", "stat": "inactive_file 10\n"}
    write(tmp_path, {"proc/meminfo": MEMINFO, "proc/self/cgroup": "0::/\n"})
    write(tmp_path, {f"cgroup/memory.{name}": text for name, text in files.items()})
    assert available(tmp_path) == 0


def test_version_one_of_control_groups_in_a_container(tmp_path: Path) -> None:
    """The path is the host's, the mount the container's own: the root tells."""
    write(
        tmp_path,
        {
            "proc/meminfo": MEMINFO,
            "proc/self/cgroup": "9:cpu,cpuacct:/x\n4:memory:/docker/abc\n0::/\n",
            "cgroup/memory/memory.limit_in_bytes": "5000000\n",
            "cgroup/memory/memory.usage_in_bytes": "1000000\n",
            "cgroup/memory/memory.stat": "cache 5\ntotal_inactive_file 500000\n",
        },
    )
    assert available(tmp_path) == 4500000
