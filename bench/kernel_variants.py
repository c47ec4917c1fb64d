"""The compilations of each Triton kernel in kernel_resources.py, for Qwen2.5-VL and Qwen3-VL.

Importing this module imports triton; not in the process of its interpreter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from triton import next_power_of_2

from vtts_rt.kernels import (
    linear_fp8,
    merge_parts,
    paged_attention,
    patch_embed,
    patchify,
    rmsnorm,
    rotary,
    rotary_kv,
    sampling,
    segment_attention,
    swiglu,
)

Variant = dict[str, Any]
OPTIONS = ("num_warps", "num_stages")
SPILLS = "sm_80 only, up to 72 bytes: places of rows that wait for the store, none in a loop's code"


def _variant(
    name: str,
    kernel: Any,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    unaligned: str = "",
    spills: str = "",
) -> Variant:
    """One compilation. types: names of arguments, apart by spaces -> their Triton type; the others
    that are no constants are i32. constants: and OPTIONS. unaligned: names of arguments that are no
    multiples of 16. spills: the sentence that explains them."""
    type_of = {argument: kind for names, kind in types.items() for argument in names.split()}
    constexprs = {name: value for name, value in constants.items() if name not in OPTIONS}
    arguments = (argument for argument in kernel.arg_names if argument not in constexprs)
    return {
        "name": name,
        "kernel": kernel,
        "signature": {argument: type_of.get(argument, "i32") for argument in arguments},
        "constexprs": constexprs,
        "unaligned": unaligned.split(),
        "spills": spills,
        **{name: value for name, value in constants.items() if name in OPTIONS},
    }


def _linear_fp8() -> Iterator[Variant]:
    """Rows of any 16-aligned width."""
    m = linear_fp8
    for kind in ("bf16", "fp16"):
        types = {"x_ptr bias_ptr out_ptr": f"*{kind}", "weight_ptr": "*u8", "scale_ptr": "*fp32"}
        tile = {"OUTPUTS": m.ROW_OUTPUTS, "CHANNELS": m.ROW_CHANNELS, "num_warps": m.ROW_WARPS}
        yield _variant(f"{kind}, 1 row", m.row_kernel, types, {"HAS_BIAS": False, **tile})
        for rows in (8, 16, 64):
            tile = {"HAS_BIAS": False, "WIDE": False, **m.tile(rows)}
            yield _variant(f"{kind}, {rows} rows", m.tile_kernel, types, tile, "num_rows")


def _merge_parts() -> Iterator[Variant]:
    m = merge_parts
    types = {"parts_ptr part_lse_ptr": "*fp32", "out_ptr": "*bf16"}
    for parts in (4, 64, 128):
        sizes = {"HEAD_DIM": 128, "PARTS": parts, "BLOCK_D": 128}
        sizes["num_warps"] = m.num_warps(parts * 128)
        name, unaligned = f"bf16, D 128, {parts} parts", "num_parts num_places"
        yield _variant(name, m.merge_parts_kernel, types, sizes, unaligned)


def _paged_attention() -> Iterator[Variant]:
    """7B (28 heads over 4) and 3B (16 over 2), pages of 16: decoding, few rows and drafts, prefill,
    shared prefixes; float32 and the largest D."""
    m = paged_attention
    split, shared = {"PARTIAL": True}, {"PARTIAL": True, "CAUSAL": False}
    for name, kind, dim, group, kv_heads, rows, changed in (
        ("7B, prefill", "bf16", 128, 7, 4, 1024, {}),
        ("3B, prefill", "bf16", 128, 8, 2, 1024, {}),
        ("7B, 1 row", "bf16", 128, 7, 4, 1, {}),
        *((f"7B, {rows} rows, split", "bf16", 128, 7, 4, rows, split) for rows in (1, 4, 8, 16)),
        ("7B, prefix shared by 8 rows", "bf16", 128, 7, 4, 8, shared),
        ("7B, prefix shared by 16 rows", "bf16", 128, 7, 4, 16, shared),
        ("7B, keys of one row", "bf16", 128, 7, 4, 1, {**shared, "HAS_BOUNDS": False}),
        ("7B, prefill", "fp32", 128, 7, 4, 1024, {}),
        ("7 heads over 1, 1 rows", "bf16", 256, 7, 1, 1, {}),
        ("7 heads over 1, 1024 rows", "bf16", 256, 7, 1, 1024, {}),
    ):
        flags = {"HAS_BOUNDS": True, "CAUSAL": True, "PARTIAL": False, "WIDE": False} | changed
        block_m, block_n, warps, stages = m.tiles(rows * group, dim, 4 if kind == "fp32" else 2)
        sizes = {"KV_HEADS": kv_heads, "GROUP": group, "HEAD_DIM": dim, "PAGE_SIZE": 16}
        blocks = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_D": dim}
        yield _variant(
            f"{kind}, D {dim}, pages of 16, {name}",
            m.paged_attention_kernel,
            {
                "q_ptr keys_ptr values_ptr": f"*{kind}",
                "table_ptr bounds_ptr lengths_ptr": "*i32",
                "out_ptr": "*fp32" if flags["PARTIAL"] else f"*{kind}",
                "lse_ptr": "*fp32",
                "scale": "fp32",
            },
            {**flags, **sizes, **blocks, "num_warps": warps, "num_stages": stages},
            "table_stride num_tiles num_splits num_rows",
            SPILLS if flags["PARTIAL"] else "",
        )


def _patch_embed() -> Iterator[Variant]:
    """Both sizes of blocks in both types, of both sizes of rows."""
    m = patch_embed
    for size, blocks in (("many rows", m.LARGE), ("few rows", m.SMALL)):
        for kind, row in (("bf16", 1176), ("fp16", 1176), ("bf16", 1536)):
            types = {"pixel_ptr": "*u8", "weight_ptr out_ptr": f"*{kind}", "bias_ptr": "*fp32"}
            name = f"{kind}, {size}{', 1536 values' * (row == 1536)}"
            constants = {"PATCH_ROW": row, "WIDE": False, **blocks}
            yield _variant(name, m.patch_embed_kernel, types, constants, "num_rows")


def _patchify() -> Iterator[Variant]:
    """Every type of rows of both sums, and 16-bit rows with patches of 16 px."""
    m = patchify
    for kind, px in (*((kind, 14) for kind in ("fp32", "fp16", "bf16", "u8")), ("bf16", 16)):
        for fixed in (True, False):
            yield _variant(
                f"{kind}, {'integer' if fixed else 'float'} sums{', 16 px' * (px == 16)}",
                m.patchify_kernel,
                {
                    "job_ptr places_ptr": "*i64",
                    "job_of_unit_ptr": "*i32",
                    "normalisation_ptr": "*fp32",
                    "stage_ptr": "*u8" if fixed else "*fp32",
                    "out_ptr": f"*{kind}",
                },
                {
                    "PATCH_PX": px,
                    "FIXED": fixed,
                    "HAS_PLACES": kind != "fp32",
                    "num_warps": m.NUM_WARPS,
                },
                "num_units stage_rows",
            )


def _rmsnorm() -> Iterator[Variant]:
    """Rows of Qwen2.5-VL 3B and 7B, language model and tower."""
    m = rmsnorm
    types = {"x_ptr residual_ptr weight_ptr y_ptr sum_ptr": "*bf16", "eps": "fp32"}
    for num_features in (1280, 2048, 3584):
        for has_residual in (False, True):
            block = next_power_of_2(num_features)
            constants = {"HAS_RESIDUAL": has_residual, "BLOCK": block}
            constants["num_warps"] = m.num_warps(block)
            name = f"bf16, {num_features}{', residual' * has_residual}"
            yield _variant(name, m.rmsnorm_kernel, types, constants)


def _rotary() -> Iterator[Variant]:
    """Heads of the language model and of the vision tower."""
    m = rotary
    for kind, angles, half in (("bf16", "bf16", 64), ("bf16", "fp32", 40), ("fp16", "fp32", 40)):
        types = {"x_ptr": f"*{kind}", "cos_ptr sin_ptr": f"*{angles}"}
        sizes = {"HALF": half, "HEADS": m.HEADS, "BLOCK": next_power_of_2(half)}
        sizes["num_warps"] = m.NUM_WARPS
        name = f"{kind}, angles {angles}, head dim {2 * half}"
        yield _variant(name, m.rotary_kernel, types, sizes)


def _rotary_kv() -> Iterator[Variant]:
    """Heads of 128, as the language models have."""
    m = rotary_kv
    sizes = {"HALF": 64, "HEADS": m.HEADS, "BLOCK": 64, "num_warps": m.NUM_WARPS}
    for kind in ("bf16", "fp16"):
        types = {"qkv_ptr cos_ptr sin_ptr q_ptr keys_ptr values_ptr": f"*{kind}"}
        types["slot_ptr"] = "*i64"
        name, unaligned = f"{kind}, head dim 128", "num_heads num_kv_heads"
        yield _variant(name, m.rotary_kv_kernel, types, sizes, unaligned)


def _sampling() -> Iterator[Variant]:
    """151,936 logits in the types that models and filters give."""
    m = sampling
    types = {
        "temperature_ptr max_ptr sum_ptr logprob_ptr": "*fp32",
        "seed_ptr member_ptr round_ptr position_ptr best_ptr token_ptr": "*i64",
    }
    for kind, divide in (("bf16", True), ("fp16", True), ("fp32", True), ("fp32", False)):
        for part, kernel, size in (
            ("chunks", m.chunk_kernel, {"BLOCK": m.BLOCK}),
            ("merge", m.merge_kernel, {"CHUNKS": 256}),
        ):
            name = f"{part} of {kind}{', divided' * (not divide)}"
            constants = {"DIVIDE": divide, **size, "num_warps": m.NUM_WARPS}
            yield _variant(
                name, kernel, {"logits_ptr": f"*{kind}", **types}, constants, "num_chunks"
            )


def _segment_attention() -> Iterator[Variant]:
    """Qwen2.5-VL's heads of 80 in windows and whole pairs, the 64 of the bench model, and the
    largest."""
    m = segment_attention
    torch_types = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    for kind, dim, longest in (
        ("bf16", 80, m.WINDOW),
        ("bf16", 80, 4096),
        ("fp16", 80, 4096),
        ("bf16", 64, 4096),
        ("bf16", 128, 4096),
        ("fp32", 80, 4096),
    ):
        low, high = m.split_features(dim)
        sizes = {"DIM": dim, "LOW": low, "HIGH": high, "WIDE": False}
        sizes |= m.blocks(torch_types[kind], longest)
        types = {"q_ptr k_ptr v_ptr out_ptr": f"*{kind}", "table_ptr": "*i32", "scale": "fp32"}
        name = f"{kind}, head dim {dim}, {'windows' if longest == m.WINDOW else 'pairs'}"
        yield _variant(name, m.segment_attention_kernel, types, sizes)


def _swiglu() -> Iterator[Variant]:
    """The MLPs of 3B, of 7B and of the vision tower."""
    m = swiglu
    for kind in ("bf16", "fp16"):
        for num_hidden in (11008, 18944, 3420):
            sizes = {"NUM_HIDDEN": num_hidden, "BLOCK": m.BLOCK, "num_warps": m.NUM_WARPS}
            types = {"x_ptr out_ptr": f"*{kind}"}
            yield _variant(f"{kind}, {num_hidden}", m.swiglu_kernel, types, sizes)


# File of kernels/ -> its compilations. cascade_attention takes those of paged_attention.
VARIANTS = {
    "cascade_attention": tuple,
    "linear_fp8": _linear_fp8,
    "merge_parts": _merge_parts,
    "paged_attention": _paged_attention,
    "patch_embed": _patch_embed,
    "patchify": _patchify,
    "rmsnorm": _rmsnorm,
    "rotary": _rotary,
    "rotary_kv": _rotary_kv,
    "sampling": _sampling,
    "segment_attention": _segment_attention,
    "swiglu": _swiglu,
}


def variants(name: str) -> list[Variant]:
    """Of a file of kernels/: name, kernel, signature, constexprs, unaligned, spills, num_warps
    and, where it is not Triton's own choice, num_stages."""
    return list(VARIANTS[name]())
