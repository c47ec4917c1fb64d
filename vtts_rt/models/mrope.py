"""Positions of text and vision tokens on M-RoPE's three axes (time, height, width).

Two rules are in use for the text that follows a video of many frame pairs, and they disagree
once its time span exceeds its sides: parity `release` (the original release, transformers 4.49 to
4.57, vLLM) goes on after the largest position, `transformers` (from version 5 on, `get_rope_index`)
after the larger side. Generated tokens are text that follows: in transformers 5 they go on from the
last prompt token's position (`generate`), not from the largest one (a forward pass without
positions). With one pair a segment the rules coincide.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vtts_rt.config import PARITIES
from vtts_rt.models.tokenizer import EncodedPrompt
from vtts_rt.types import MERGE_SIZE, Parity, require


@dataclass(slots=True)
class MropePositions:
    """Hands out positions in prompt order.

    parity: the rule above. tokens_per_second: temporal positions a second (`vision_config`; 2 in
    released models); None where they count frame pairs, whatever the time between them.
    next_position: where the next text, generated or vision token starts.
    """

    parity: Parity
    tokens_per_second: float | None
    next_position: int = 0

    def __post_init__(self) -> None:
        known = self.parity in PARITIES
        require("MropePositions", "parity", self.parity, known, f"one of {PARITIES}")

    def text(self, num_tokens: int) -> Tensor:
        """(3, num_tokens) int64 for text: all axes count alike."""
        start = self.next_position
        self.next_position += num_tokens
        return torch.arange(start, start + num_tokens).expand(3, -1)

    def vision(
        self,
        grid_thw: tuple[int, int, int],
        seconds_per_grid: float = 1.0,
        is_image: bool = False,
    ) -> Tensor:
        """(3, t * h/2 * w/2) int64 for a vision segment of t pairs of h x w patches.

        seconds_per_grid: seconds between pairs, which count where there are tokens_per_second;
            images step by one.
        """
        start = self.next_position
        t, h, w = grid_thw[0], grid_thw[1] // MERGE_SIZE, grid_thw[2] // MERGE_SIZE
        # float32 throughout: both rules truncate float32 products, and 3 * (1 / 3) depends on it.
        per_second = None if is_image else self.tokens_per_second
        step = torch.tensor(1.0 if per_second is None else seconds_per_grid, dtype=torch.float32)
        if per_second is not None:
            step = step * per_second
        time = (torch.arange(t) * step).long()
        axes = torch.meshgrid(time, torch.arange(h), torch.arange(w), indexing="ij")
        positions = torch.stack(axes).reshape(3, -1) + start
        end = int(positions.max()) + 1
        self.next_position = end if self.parity == "release" else start + max(h, w)
        return positions

    def copy(self) -> MropePositions:
        """An independent builder at the same place."""
        return replace(self)


def build_position_ids(prompt: EncodedPrompt, positions: MropePositions) -> Tensor:
    """(3, N) int64 of a whole prompt; `positions` advances past it."""
    parts = []
    place = 0
    for span in prompt.spans:
        parts.append(positions.text(span.start - place))
        segment = span.segment
        parts.append(positions.vision(segment.grid_thw, segment.seconds_per_grid, segment.is_image))
        place = span.start + span.length
    parts.append(positions.text(len(prompt.token_ids) - place))
    return torch.cat(parts, dim=1)
