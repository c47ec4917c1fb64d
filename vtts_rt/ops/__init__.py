"""Functional ops: each has an obvious reference beside the function that dispatches."""

from __future__ import annotations

from vtts_rt.ops.dispatch import explain
from vtts_rt.ops.linear import linear, linear_ref
from vtts_rt.ops.paged_attention import paged_attention, paged_attention_ref
from vtts_rt.ops.patch_embed import PatchEmbedWeight, patch_embed, patch_embed_ref
from vtts_rt.ops.patchify import PatchifyJob, patchify, patchify_ref
from vtts_rt.ops.rmsnorm import rmsnorm, rmsnorm_ref
from vtts_rt.ops.rotary import rotary, rotary_ref
from vtts_rt.ops.segment_attention import Run, segment_attention, segment_attention_ref
from vtts_rt.ops.swiglu import swiglu, swiglu_ref

__all__ = [
    "PatchEmbedWeight",
    "PatchifyJob",
    "Run",
    "explain",
    "linear",
    "linear_ref",
    "paged_attention",
    "paged_attention_ref",
    "patch_embed",
    "patch_embed_ref",
    "patchify",
    "patchify_ref",
    "rmsnorm",
    "rmsnorm_ref",
    "rotary",
    "rotary_ref",
    "segment_attention",
    "segment_attention_ref",
    "swiglu",
    "swiglu_ref",
]
