"""What runs here and why: versions, build, devices, and every choice between implementations."""

from __future__ import annotations

import importlib.metadata
import os
import platform

import torch

import vtts_rt
from vtts_rt.config import ENVIRONMENT_VARIABLES, index_cache_folder
from vtts_rt.ops import native
from vtts_rt.ops.decode_step import MAX_ROWS, usable
from vtts_rt.ops.dispatch import explain, interpreted
from vtts_rt.ops.paged_attention import by_use
from vtts_rt.video.decoders import DALI_CPU_CODECS, DALI_NVDEC_CODECS, dali_refusal

_REQUIRED = ("torch", "transformers", "safetensors", "numpy", "av", "pillow", "rich")
_OPTIONAL = {
    "triton": "kernels on NVIDIA GPUs; pip install 'vtts_rt[triton]'",
    "nvidia-dali-cuda130": "DALI decoding; pip install 'vtts_rt[dali]'",
    "llguidance": "--constrain-clues; pip install 'vtts_rt[grammar]'",
    "peft": "adapters in checkpoint folders; pip install 'vtts_rt[adapters]'",
}


def environment() -> dict[str, dict[str, str]]:
    """What `vtts-rt env` prints, by section: versions, optional, build, device, ops, video,
    environment.

    "video" has a line for each decoder and device, and what "auto" comes to.
    "ops" has a line for each op and device there is, `<backend> (<reason>)`, "none" where the
    one asked for (VTTS_RT_BACKEND) cannot run, and lines about choices inside and above ops.
    """
    cuda = torch.cuda.is_available()
    return {
        "versions": {
            "vtts_rt": vtts_rt.__version__,
            "python": platform.python_version(),
            **{name: _version(name) or "missing" for name in _REQUIRED},
        },
        "optional": {
            name: _version(name) or f"not installed ({purpose})"
            for name, purpose in _OPTIONAL.items()
        },
        "build": _build(),
        "device": {
            "cpu": f"{os.cpu_count()} logical cores, torch uses {torch.get_num_threads()} threads",
            "cuda": torch.cuda.get_device_name() if cuda else "none visible to torch",
        },
        "ops": {
            **{choice.op: f"{choice.backend} ({choice.reason})" for choice in explain() + by_use()},
            **_native(),
            "triton kernels": _triton(cuda),
            "decoding as CUDA graphs": "yes" if cuda else "no (the model runs on cpu)",
        },
        "video": _video(),
        "environment": {
            name: f"{os.environ.get(name, 'unset')} ({purpose})"
            for name, purpose in ENVIRONMENT_VARIABLES.items()
        },
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _build() -> dict[str, str]:
    try:
        from vtts_rt._build_info import BUILD_INFO
    except ImportError:
        return {"extension": "not built: the package runs from a plain source tree"}
    return {name: str(value) for name, value in BUILD_INFO.items()}


def _native() -> dict[str, str]:
    """What the backend "cpu" does on this processor."""
    isa = native.bfloat16_isa()
    return {
        "instruction set of native kernels": native.best_isa(),
        'dtype "auto" of bfloat16 models on cpu': (
            f"bfloat16 (products by {isa})"
            if isa is not None
            else "float32 (neither AMX nor AVX512_BF16: bfloat16 is widened)"
        ),
        f"decoding of up to {MAX_ROWS} rows in one native call": (
            "yes" if usable(torch.empty(1, 128), 128) else "no (an op runs another backend)"
        ),
    }


def _video() -> dict[str, str]:
    """Which decoder takes which files, and where their indices are kept."""
    cpu, gpu = dali_refusal(None), dali_refusal(0)
    if gpu is None and not torch.cuda.is_available():
        gpu = "no CUDA device visible to torch"
    return {
        "pyav on cpu": "every codec of FFmpeg",
        "dali on cpu": f"{', '.join(DALI_CPU_CODECS)}; PyAV for the rest"
        if cpu is None
        else f"no ({cpu})",
        "dali on cuda": f"{', '.join(DALI_NVDEC_CODECS)}; PyAV for the rest"
        if gpu is None
        else f"no ({gpu})",
        "auto": "pyav" if gpu else "dali where the model is on a GPU, else pyav",
        "index cache": _index_cache(),
    }


def _index_cache() -> str:
    folder = index_cache_folder()
    if folder is None:
        return "off (VTTS_RT_CACHE_DIR=off)"
    try:
        num_bytes = sum(path.stat().st_size for path in folder.glob("index-*.sqlite3"))
    except OSError as error:  # a folder that may not be read
        return f"{folder} ({error.strerror})"
    return f"{folder}, {num_bytes / 1e6:.1f} MB"


def _triton(cuda: bool) -> str:
    if interpreted():
        return "in Triton's interpreter (TRITON_INTERPRET=1): for tests"
    return "compiled at first use" if cuda else "no (no CUDA device visible to torch)"
