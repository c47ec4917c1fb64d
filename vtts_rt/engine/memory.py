"""How much memory the KV pages may take where no budget is given."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from vtts_rt.config import EngineConfig

# On an accelerator the weights are loaded and nearly all that is left is for KV; the rest is for
# activations, the vision cache and what the allocator cannot join.
_CUDA_SHARE = 0.8
# Host memory is shared with frames, features, the page cache and other programs.
_CPU_SHARE = 1 / 8
_UNKNOWN_BYTES = 8 << 30  # assumed where the system does not say: KV then gets 1 GiB
# Of control groups: file of the limit, file of the use, field of memory.stat that is file cache.
_VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_VERSION_2 = ("memory.max", "memory.current", "inactive_file")


def kv_budget(config: EngineConfig, page_bytes: int, device: torch.device) -> int:
    """Bytes for KV pages: config.kv_bytes, or if that is 0 a share of what is free now on
    `device`, but at least one page."""
    if config.kv_bytes:
        return config.kv_bytes
    if device.type == "cuda":
        share = _CUDA_SHARE * torch.cuda.mem_get_info(device)[0]
    else:
        share = _CPU_SHARE * available_bytes()
    return max(page_bytes, int(share))


def available_bytes(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Host memory that this process can take without swapping: what the kernel says is
    available, or what the process's control group has left if that is less."""
    return min([_machine_bytes(proc), *_group_bytes(proc, cgroup)])


def _machine_bytes(proc: Path) -> int:
    try:
        fields = dict(line.split(":", 1) for line in (proc / "meminfo").read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) << 10
    except (OSError, ValueError, KeyError, IndexError):
        pass
    try:  # not Linux: half of the machine, as nothing says what others use
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    except (AttributeError, OSError, ValueError):
        return _UNKNOWN_BYTES


def _group_bytes(proc: Path, cgroup: Path) -> list[int]:
    """Limit less use of each control group this process is in, up to the root, as every ancestor
    limits too; the file cache of a group is not use."""
    try:
        lines = (proc / "self/cgroup").read_text().splitlines()
    except OSError:
        return []
    left = []
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0":
            root, (limit, used, cache) = cgroup, _VERSION_2
        elif "memory" in controllers.split(","):
            root, (limit, used, cache) = cgroup / "memory", _VERSION_1
        else:
            continue
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            if not folder.is_relative_to(root):
                break
            try:
                stat = (folder / "memory.stat").read_text().splitlines()
                spare = int(dict(line.split() for line in stat).get(cache, 0))
                most, now = (int((folder / name).read_text()) for name in (limit, used))
                left.append(max(0, most - now + spare))
            except (OSError, ValueError):
                continue  # no such group, or its limit is "max"
    return left
