"""Rows of rollout groups made by hand, and what transformers says of each by itself."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vtts_rt.models.mrope import MropePositions
from vtts_rt.models.qwen2_5_vl import GEOMETRY
from vtts_rt.models.tokenizer import VisionSpan
from vtts_rt.rollout.rows import RolloutRow
from vtts_rt.types import PairRef, PixelBox, Segment

SIDE = 2  # tokens of a pair, each way
VIDEO_PAD, IMAGE_PAD = 390, 391


@dataclass(frozen=True)
class Video:
    """Pairs of SIDE x SIDE tokens."""

    keys: tuple[str, ...]
    is_image: bool = False


@dataclass(frozen=True)
class Said:
    ids: tuple[int, ...]


def said(*ids: int) -> Said:
    return Said(ids)


Part = Sequence[int] | Video | Said


def make_row(*parts: Part) -> RolloutRow:
    """Given ids, videos, and what the model said, with transformers' positions."""
    rope = MropePositions("transformers", 2.0)
    ids: list[int] = []
    mask: list[bool] = []
    positions, spans = [torch.empty(3, 0, dtype=torch.int64)], []
    for part in parts:
        if isinstance(part, Video):
            new = [IMAGE_PAD if part.is_image else VIDEO_PAD] * (len(part.keys) * SIDE * SIDE)
            segment = segment_of(part)
            spans.append(VisionSpan(len(ids), len(new), segment))
            positions.append(rope.vision(segment.grid_thw, 1.0, part.is_image))
        else:
            new = list(part.ids if isinstance(part, Said) else part)
            positions.append(rope.text(len(new)))
        ids += new
        mask += [isinstance(part, Said)] * len(new)
    return RolloutRow(
        token_ids=np.array(ids, np.int64),
        mask=np.array(mask, bool),
        logprobs=np.where(mask, -1.0, np.nan),
        position_ids=torch.cat(positions, 1).numpy(),
        spans=tuple(spans),
    )


def segment_of(video: Video) -> Segment:
    size = SIDE * GEOMETRY.token_px
    pairs = tuple(PairRef(0, key, 0, 0, 0.0) for key in video.keys)
    box = PixelBox(0, 0, size, size)
    return Segment(pairs, box, (size, size), GEOMETRY, is_image=video.is_image)


def flat_group(video: Video | None = None) -> list[Any]:
    """Eight members: some split in the middle of the answer, one says one token, two are equal."""
    prompt: list[Part] = [[5, 6, 7], video or Video(("a0", "a1")), [8, 9]]
    answers = [
        said(20, 21, 22, 23),
        said(20, 21, 30),
        said(20, 21, 22, 24, 25, 26),
        said(11),
        said(20, 21, 22, 23),
        said(40, 41, 42, 43, 44),
        said(20),
        said(50, 21, 22),
    ]
    return [make_row(*prompt, answer) for answer in answers]


def nested_group() -> list[Any]:
    """Nine members over four rounds, with videos inside branches, one of them in two branches."""
    first: list[Part] = [[5, 6], Video(("a0", "a1")), Video(("i",), True), [8]]
    rows = []
    for i in range(3):
        second: list[Part] = [*first, said(20, 21 + i), [9], Video(("b0", f"b{i // 2}")), [8]]
        for j in range(3):
            third: list[Part] = [*second, said(30, 31 + j % 2, 3), [9], Video((f"c{j}",))]
            rows.append(make_row(*third, [7], said(60, 61), [9, 9], said(*range(70, 71 + j))))
    return rows


def forest() -> list[Any]:
    """Two groups with the same question and grid on two videos, and one of text."""
    text = [make_row([5, 6, 7], said(*ids)) for ids in ((1, 2), (1, 3))]
    return [*flat_group(), *flat_group(Video(("a0", "other")))[:3], *text]


GROUPS = {"flat": flat_group, "nested": nested_group, "forest": forest}


def random_rows(rng: np.random.Generator) -> list[Any]:
    """Rows that agree up to random places, from few tokens and pairs."""
    rows: list[list[Part]] = []
    for _ in range(int(rng.integers(1, 8))):
        parts: list[Part] = [[int(rng.integers(2))]]
        if rows and rng.random() < 0.8:
            other = rows[int(rng.integers(len(rows)))]
            parts = other[: int(rng.integers(1, len(other) + 1))]
        parts = list(parts)
        for _ in range(int(rng.integers(0, 5))):
            ids = tuple(rng.integers(0, 3, int(rng.integers(1, 5))).tolist())
            keys = tuple(f"k{i}" for i in rng.integers(0, 3, int(rng.integers(1, 3))))
            parts.append([list(ids), Said(ids), Video(keys)][int(rng.integers(3))])
        rows.append(parts)
    return [make_row(*parts) for parts in rows]


def pair_features(tree: Any, width: int) -> torch.Tensor:
    """(P, width), a pair's by its key alone."""
    found = []
    for pair in tree.pairs:
        seed = zlib.crc32(str(pair.key).encode())
        generator = torch.Generator().manual_seed(seed)
        found.append(torch.randn(pair.num_tokens, width, generator=generator) * 0.5)
    return torch.cat([torch.empty(0, width), *found])


def outputs_of(row: Any, base: Any, features: dict[Any, torch.Tensor]) -> dict[str, Any]:
    """mm_encoder_outputs of a row by itself; features: of each pair."""
    hidden = base.config.get_text_config().hidden_size
    of_kind: dict[str, list[torch.Tensor]] = {"image": [], "video": []}
    for ref in row.vision:
        image = row.token_ids[ref.start] == base.config.image_token_id
        of_kind["image" if image else "video"] += [features[key] for key in ref.keys]
    outputs = {}
    for kind, parts in of_kind.items():
        if parts:
            pooled, *deep = torch.cat(parts).split(hidden, dim=1)
            outputs[kind] = BaseModelOutputWithPooling(pooler_output=(pooled,))
            outputs[kind].deepstack_features = [(level,) for level in deep]
    return outputs


def row_scores(
    logits: torch.Tensor, row: Any, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """logits: (N, vocab_size) -> log-probs and entropies of what the row's model said."""
    places = torch.from_numpy(np.flatnonzero(row.mask))
    logp = (logits[places - 1].float() / temperature).log_softmax(-1)
    chosen = logp.gather(1, torch.from_numpy(row.token_ids)[places, None])[:, 0]
    return chosen, -(logp.exp() * logp).sum(-1)


def separate(
    model: Any,
    base: Any,
    rows: Sequence[Any],
    tree: Any,
    features: torch.Tensor,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row by its own forward pass of transformers, with the same positions and features."""
    parts = dict(
        zip(
            (pair.key for pair in tree.pairs),
            features.split([pair.num_tokens for pair in tree.pairs]),
            strict=True,
        )
    )
    scores = []
    for row in rows:
        out = model(
            input_ids=torch.from_numpy(row.token_ids)[None],
            position_ids=torch.from_numpy(row.position_ids)[:, None],
            mm_encoder_outputs=outputs_of(row, base, parts),
            use_cache=False,
        )
        scores.append(row_scores(out.logits[0], row, temperature))
    logprobs, entropies = zip(*scores, strict=True)
    return torch.cat(logprobs), torch.cat(entropies)
