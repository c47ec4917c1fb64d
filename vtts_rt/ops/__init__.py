"""Functional ops: each has an obvious reference beside the function that dispatches."""

from __future__ import annotations

from vtts_rt.ops.cascade_attention import cascade_attention, cascade_attention_ref, find_groups
from vtts_rt.ops.dispatch import explain
from vtts_rt.ops.linear import linear, linear_ref
from vtts_rt.ops.linear_fp8 import linear_fp8, linear_fp8_ref, quantize_fp8
from vtts_rt.ops.linear_int8 import linear_int8, linear_int8_ref, quantize_int8
from vtts_rt.ops.paged_attention import paged_attention, paged_attention_ref
from vtts_rt.ops.patch_embed import PatchEmbedWeight, patch_embed, patch_embed_ref
from vtts_rt.ops.patchify import PatchifyJob, patchify, patchify_ref
from vtts_rt.ops.rmsnorm import rmsnorm, rmsnorm_ref
from vtts_rt.ops.rotary import rotary, rotary_ref
from vtts_rt.ops.rotary_kv import rotary_kv, rotary_kv_ref
from vtts_rt.ops.sampling import SampleParams, sample, sample_token, sampling_ref
from vtts_rt.ops.segment_attention import Run, segment_attention, segment_attention_ref
from vtts_rt.ops.swiglu import swiglu, swiglu_ref

__all__ = [
    "PatchEmbedWeight",
    "PatchifyJob",
    "Run",
    "SampleParams",
    "cascade_attention",
    "cascade_attention_ref",
    "explain",
    "find_groups",
    "linear",
    "linear_fp8",
    "linear_fp8_ref",
    "linear_int8",
    "linear_int8_ref",
    "linear_ref",
    "paged_attention",
    "paged_attention_ref",
    "patch_embed",
    "patch_embed_ref",
    "patchify",
    "patchify_ref",
    "quantize_fp8",
    "quantize_int8",
    "rmsnorm",
    "rmsnorm_ref",
    "rotary",
    "rotary_kv",
    "rotary_kv_ref",
    "rotary_ref",
    "sample",
    "sample_token",
    "sampling_ref",
    "segment_attention",
    "segment_attention_ref",
    "swiglu",
    "swiglu_ref",
]
