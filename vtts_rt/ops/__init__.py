"""Functional ops: each has an obvious reference beside the function that dispatches."""

from __future__ import annotations

from vtts_rt.ops.dispatch import explain
from vtts_rt.ops.patchify import PatchifyJob, patchify, patchify_ref
from vtts_rt.ops.rmsnorm import rmsnorm, rmsnorm_ref

__all__ = ["PatchifyJob", "explain", "patchify", "patchify_ref", "rmsnorm", "rmsnorm_ref"]
