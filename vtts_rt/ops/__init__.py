"""Functional ops: each has an obvious reference, `<op>_ref`, in the file of its name."""

from __future__ import annotations

from vtts_rt.ops.cascade_attention import cascade_attention, find_groups
from vtts_rt.ops.dispatch import explain
from vtts_rt.ops.gelu import gelu
from vtts_rt.ops.linear import linear, quantize_int8
from vtts_rt.ops.linear_fp8 import linear_fp8, quantize_fp8
from vtts_rt.ops.packed import Matrix
from vtts_rt.ops.paged_attention import paged_attention
from vtts_rt.ops.patch_embed import PatchEmbedWeight, patch_embed
from vtts_rt.ops.patchify import PatchifyJob, patchify
from vtts_rt.ops.rmsnorm import rmsnorm
from vtts_rt.ops.rotary import rotary
from vtts_rt.ops.rotary_kv import rotary_kv
from vtts_rt.ops.sampling import SampleParams, sample, sample_token
from vtts_rt.ops.segment_attention import Run, segment_attention
from vtts_rt.ops.swiglu import swiglu

__all__ = [
    "Matrix",
    "PatchEmbedWeight",
    "PatchifyJob",
    "Run",
    "SampleParams",
    "cascade_attention",
    "explain",
    "find_groups",
    "gelu",
    "linear",
    "linear_fp8",
    "paged_attention",
    "patch_embed",
    "patchify",
    "quantize_fp8",
    "quantize_int8",
    "rmsnorm",
    "rotary",
    "rotary_kv",
    "sample",
    "sample_token",
    "segment_attention",
    "swiglu",
]
