"""Which decoder a file gets, before any is imported."""

from __future__ import annotations

import importlib.util
from ctypes import CDLL

from vtts_rt.types import Decoder

# What `nvidia.dali.fn.decoders.video` 2.4 decodes (its documentation, and seen on the CPU), by the
# names of FFmpeg.
DALI_CPU_CODECS = ("vp8", "vp9", "mjpeg")
DALI_NVDEC_CODECS = (*DALI_CPU_CODECS, "h264", "hevc", "av1", "mpeg4")


def dali_refusal(device: int | None) -> str | None:
    """Why DALI cannot decode here, or None. device: a CUDA ordinal for NVDEC, None for the CPU."""
    if (
        importlib.util.find_spec("nvidia") is None
        or importlib.util.find_spec("nvidia.dali") is None
    ):
        return "nvidia-dali is not installed: pip install 'vtts_rt[dali]'"
    if device is None:
        return None
    try:
        CDLL("libnvcuvid.so.1")
    except OSError:
        return "libnvcuvid.so.1, the video part of NVIDIA's driver (NVDEC), is not there"
    return None


def chosen_decoder(decoder: Decoder, device: int | None) -> Decoder:
    """ "pyav" or "dali". RuntimeError where DALI is asked for and cannot be used."""
    refusal = None if decoder == "pyav" else dali_refusal(device)
    if decoder == "auto":
        # On the CPU DALI knows three codecs and decodes none of them faster (docs/benchmarks.md).
        return "pyav" if device is None or refusal else "dali"
    if refusal is not None:
        raise RuntimeError(f"open_video: decoder dali cannot be used: {refusal}")
    return decoder
