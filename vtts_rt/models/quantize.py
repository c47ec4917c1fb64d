"""Quantization of a loaded model: 8-bit weights in the language tower, made from trained ones."""

from __future__ import annotations

from torch import Tensor, nn

from vtts_rt.config import QUANTIZATIONS
from vtts_rt.models.base import VideoLM
from vtts_rt.models.language import LanguageModel
from vtts_rt.models.layers import Linear, Packable
from vtts_rt.ops.linear import linear, quantize_int8
from vtts_rt.ops.linear_fp8 import linear_fp8, quantize_fp8
from vtts_rt.ops.packed import Matrix
from vtts_rt.types import require

_QUANTIZE = {"int8": quantize_int8, "fp8": quantize_fp8}


class QuantizedLinear(Packable):
    """`models.layers.Linear` with weights of 8 bits and a scale for each output; no training.

    weight: (O, C) int8 or float8_e4m3fn; scale: (O,) float32; bias: (O,) or None. `.to(dtype)` must
    not reach these buffers: quantize after a model has its dtype.
    """

    scale: Tensor
    bias: Tensor | None

    def __init__(self, quantization: str, weight: Tensor, bias: Tensor | None = None) -> None:
        """quantization: one of QUANTIZATIONS. weight: (O, C), bias: (O,), any float dtype."""
        super().__init__()
        weight8, scale = _QUANTIZE[quantization](weight)
        self.quantization = quantization
        self.register_buffer("weight", weight8)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if bias is None else bias.detach())

    @property
    def matrix(self) -> Matrix:
        return Matrix(self.weight, len(self.scale), self.scale)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., O)."""
        if self.quantization == "int8":
            return linear(x, self.matrix, self.bias)
        return linear_fp8(x, self.weight, self.scale, self.bias)


def quantize(model: VideoLM, quantization: str) -> None:
    """Replace the matrices of the language tower's layers by 8-bit ones, in place.

    quantization: "int8" (float32 or bfloat16 models on the CPU; logits too are then a product with
    bytes, the embedding stays) or "fp8" (e4m3, any device and dtype; the head stays). The vision
    tower and norms stay. The model answers as before but for the rounding of weights; it cannot be
    trained, saved or given new weights any more, and `version("language")` is another.
    Raises ValueError for another name, a model that does not fit it, or one quantized already.
    """
    known = quantization in QUANTIZATIONS
    require("quantize", "quantization", quantization, known, f"one of {', '.join(QUANTIZATIONS)}")
    require("quantize", "model", model.quantization, model.quantization is None, "unquantized")
    if quantization == "int8":
        kind = f"{str(model.dtype).removeprefix('torch.')} on {model.device.type}"
        rule = "float32 or bfloat16 on cpu for int8 (fp8 takes any)"
        require("quantize", "model", kind, kind in ("float32 on cpu", "bfloat16 on cpu"), rule)
    quantize_language(model.language, quantization)
    model.quantization = quantization
    model.forget_versions({"language"})


def quantize_language(language: LanguageModel, quantization: str) -> None:
    """`quantize` of a language model alone, unchecked."""
    _replace(language.layers, quantization)
    if quantization == "int8":
        head = language.embed_tokens if language.lm_head is None else language.lm_head
        language.lm_head = QuantizedLinear(quantization, head.matrix.plain())


def _replace(module: nn.Module, quantization: str) -> None:
    for name, child in module.named_children():
        if isinstance(child, Linear):
            setattr(module, name, QuantizedLinear(quantization, child.matrix.plain(), child.bias))
        else:
            _replace(child, quantization)
