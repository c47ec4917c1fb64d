"""The model that benches run: a random Qwen2.5-VL of 118 M parameters with Qwen's own tokenizer.

Built once into a cache folder, as a Hugging Face checkpoint, so that every engine under comparison
loads the same bytes.
"""

from __future__ import annotations

import base64
import importlib.util
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vtts_rt.models.qwen2_5_vl.chat import CHAT, SPECIAL_TOKENS

SEED = 0
# Named in results: a change of shape is a new model.
MODEL_ID = "qwen2_5_vl-random-118m-seed0"
_LIBRARIES: list[Any] = []  # operator declarations live as long as their library object
CONFIG: dict[str, Any] = {
    "text_config": {
        "vocab_size": 151936,
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [8, 12, 12],
        },
        "tie_word_embeddings": True,
    },
    "vision_config": {
        "depth": 8,
        "hidden_size": 384,
        "num_heads": 6,
        "intermediate_size": 1024,
        "out_hidden_size": 512,
        "window_size": 112,
        "fullatt_block_indexes": [3, 7],
        "tokens_per_second": 2,
    },
    "tie_word_embeddings": True,
}


def bench_model(cache: Path) -> Path:
    """Folder of the bench model under `cache`, built on first use (some 0.5 GB of float32).

    RuntimeError with the remedy if the tokenizer's ranks are not installed.
    """
    folder = cache / MODEL_ID
    if folder.is_dir():
        return folder
    import torch

    allow_broken_torchvision()
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    tokenizer = qwen_tokenizer()
    torch.manual_seed(SEED)
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**CONFIG))
    cache.mkdir(parents=True, exist_ok=True)
    # Built aside and moved: an interrupted build must not look like a model.
    aside = Path(tempfile.mkdtemp(dir=cache))
    try:
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def allow_broken_torchvision() -> None:
    """Let transformers' models be imported where torchvision cannot load its operators.

    torchvision's wheel is built for CUDA; beside a CPU torch its import ends at the fake of an
    operator that its library did not bring. Declared without a kernel, the operators satisfy
    it; what transformers takes from torchvision works without them.
    """
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        import torch

        library: Any = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
        _LIBRARIES.append(library)
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        importlib.import_module("torchvision")


def qwen_tokenizer() -> Any:
    """Qwen2.5's tokenizer as a transformers fast tokenizer, from the ranks in `dashscope`."""
    from transformers import Qwen2Tokenizer

    ranks = _qwen_ranks()
    letters = byte_letters()
    vocab = {"".join(letters[b] for b in token): rank for token, rank in ranks.items()}
    merges = [tuple("".join(letters[b] for b in part) for part in pair) for pair in _merges(ranks)]
    # The constructor adds its end token first, which is the first of the special tokens; the
    # others follow in order, so every id is Qwen's.
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=merges, eos_token=SPECIAL_TOKENS[0])
    tokenizer.add_tokens(list(SPECIAL_TOKENS[1:]), special_tokens=True)
    tokenizer.eos_token = CHAT.end_of_turn
    return tokenizer


def _qwen_ranks() -> dict[bytes, int]:
    """Byte-pair ranks of Qwen's tokenizer (file `qwen.tiktoken` of the package `dashscope`)."""
    spec = importlib.util.find_spec("dashscope")  # found, not imported: its imports are many
    for place in (spec.submodule_search_locations or ()) if spec is not None else ():
        path = Path(place) / "resources" / "qwen.tiktoken"
        if path.is_file():
            lines = path.read_bytes().splitlines()
            pairs = (line.split() for line in lines if line)
            return {base64.b64decode(token): int(rank) for token, rank in pairs}
    raise RuntimeError(
        "bench: Qwen's tokenizer ranks are not installed: pip install --no-deps dashscope"
    )


def _merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The merge that made each token, in rank order.

    Applying the lower-ranked merges to a token's bytes leaves exactly two parts: its own merge.
    """
    merges = []
    for token, rank in ranks.items():
        parts = [bytes([b]) for b in token]
        while len(parts) > 2:
            joined = [ranks.get(a + b, rank) for a, b in zip(parts, parts[1:], strict=False)]
            at = min(range(len(joined)), key=joined.__getitem__)
            if joined[at] >= rank:
                break
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
    return merges


def byte_letters() -> list[str]:
    """GPT-2's printable stand-in for each byte, which byte-level vocabularies are written in."""
    keep = {*range(33, 127), *range(161, 173), *range(174, 256)}
    letters, spare = [], 256
    for byte in range(256):
        letters.append(chr(byte if byte in keep else spare))
        spare += byte not in keep
    return letters


def moving_frames(num_frames: int, hw: tuple[int, int]) -> Iterator[np.ndarray]:
    """(H, W, 3) uint8 frames: a texture of several scales that pans, under three discs."""
    height, width = hw
    rng = np.random.default_rng(0)
    texture = np.zeros((2 * height, 2 * width, 3))
    for cell in (8, 24, 72):
        coarse = rng.normal(size=(2 * height // cell + 1, 2 * width // cell + 1, 3))
        fine = coarse.repeat(cell, 0).repeat(cell, 1)
        texture += fine[: 2 * height, : 2 * width] * (16 if cell == 8 else 28)
    texture = np.clip(texture + 128, 0, 255).astype(np.uint8)
    colours = rng.integers(0, 256, (3, 3))
    radius = height / 8
    for index in range(num_frames):
        turn = 2 * np.pi * index / 400  # frames of one lap of the pan
        top = int(height / 2 * (1 + np.sin(turn)))
        left = int(width / 2 * (1 + np.cos(turn)))
        frame = texture[top : top + height, left : left + width].copy()
        for disc, colour in enumerate(colours):
            angle = 2 * np.pi * index / (90 + 50 * disc)
            row, column = height * (0.5 + 0.3 * np.sin(angle)), width * (0.5 + 0.3 * np.cos(angle))
            y0, x0 = (max(0, int(centre - radius)) for centre in (row, column))
            around = frame[y0 : int(row + radius) + 2, x0 : int(column + radius) + 2]
            y, x = np.ogrid[y0 : y0 + around.shape[0], x0 : x0 + around.shape[1]]
            around[(y - row) ** 2 + (x - column) ** 2 < radius**2] = colour
        yield frame
