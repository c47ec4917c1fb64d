"""Quantization of a loaded model: 8-bit weights in the language tower, made from trained ones."""

from __future__ import annotations

from torch import Tensor, nn

from vtts_rt.config import QUANTIZATIONS
from vtts_rt.models.base import VideoLM
from vtts_rt.models.language import LanguageModel
from vtts_rt.ops.linear_fp8 import linear_fp8, quantize_fp8
from vtts_rt.ops.linear_int8 import linear_int8, quantize_int8
from vtts_rt.types import require

_QUANTIZE = {"int8": quantize_int8, "fp8": quantize_fp8}
_PRODUCT = {"int8": linear_int8, "fp8": linear_fp8}


class QuantizedLinear(nn.Module):
    """`models.layers.Linear` with weights of 8 bits and a scale for each output; no training.

    weight: (O, C) int8 or float8_e4m3fn; scale: (O,) float32; bias: (O,) or None. `.to(dtype)` must
    not reach these buffers: quantize after a model has its dtype.
    """

    weight: Tensor
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

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., O)."""
        return _PRODUCT[self.quantization](x, self.weight, self.scale, self.bias)


def quantize(model: VideoLM, quantization: str) -> None:
    """Replace the matrices of the language tower's layers by 8-bit ones, in place.

    quantization: "int8" (float32 models on the CPU; logits too are then a product with bytes, the
    embedding stays) or "fp8" (e4m3, any device and dtype; the head stays). The vision tower and
    norms stay. The model answers as before but for the rounding of weights; it cannot be trained,
    saved or given new weights any more, and `version("language")` is another.
    Raises ValueError for another name, a model that does not fit it, or one quantized already.
    """
    known = quantization in QUANTIZATIONS
    require("quantize", "quantization", quantization, known, f"one of {', '.join(QUANTIZATIONS)}")
    require("quantize", "model", model.quantization, model.quantization is None, "unquantized")
    if quantization == "int8":
        kind = f"{str(model.dtype).removeprefix('torch.')} on {model.device.type}"
        fits = kind == "float32 on cpu"
        require("quantize", "model", kind, fits, "float32 on cpu for int8 (fp8 takes any)")
    quantize_language(model.language, quantization)
    model.quantization = quantization
    model.forget_versions({"language"})


def quantize_language(language: LanguageModel, quantization: str) -> None:
    """`quantize` of a language model alone, unchecked."""
    _replace(language.layers, quantization)
    if quantization == "int8":
        head = language.embed_tokens if language.lm_head is None else language.lm_head
        weight = head.weight
        assert isinstance(weight, Tensor)
        language.lm_head = QuantizedLinear(quantization, weight)


def _replace(module: nn.Module, quantization: str) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, QuantizedLinear(quantization, child.weight, child.bias))
        else:
            _replace(child, quantization)
