"""ChatFormat: how the prompts of a model family are written. Each family has one instance."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from vtts_rt.types import Marker, Prompt, PromptPart, Segment, TimeLabel

BoxUnit = Literal["px", "thousandth", "fraction"]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn: who speaks ("system", "user", "assistant"), and what."""

    role: str
    parts: tuple[PromptPart, ...]


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """The control tokens of a family and what is written around them.

    turn_open: what begins a turn, with {role}. end_of_turn: the token by which a model ends its
    turn; turn_close: what ends a turn in a prompt, which begins with it.
    vision_start, vision_end: tokens around the pads of a vision segment. image_pad, video_pad: the
    token that stands for a segment before expansion, and for each of its tokens after it.
    control: what all control tokens of the family begin with, two characters that differ.
    time_label: what is written before a frame pair, with {seconds}, unless the wording says
    otherwise. system: the system turn of a conversation that brings none, "" leaves it out.
    per_pair: a video is written pair by pair in every layout, each a vision segment
    behind its label, which then says the mean time of its two frames. box_unit: of the boxes that
    the family writes: pixels of the resized view, or thousandths of its sides.
    """

    turn_open: str
    turn_close: str
    end_of_turn: str
    vision_start: str
    vision_end: str
    image_pad: str
    video_pad: str
    control: str
    time_label: str
    system: str = ""
    per_pair: bool = False
    box_unit: BoxUnit = "px"

    @property
    def vision_tokens(self) -> tuple[str, ...]:
        return self.image_pad, self.video_pad, self.vision_start, self.vision_end

    def render(
        self, messages: Sequence[Message], *, system: str | None = None, goes_on: bool = False
    ) -> Prompt:
        """The messages as turns, then the beginning of the assistant's.

        system: of messages that do not begin with a system turn; None: the format's own. goes_on:
        the prompt stands behind what a model has said, and closes that turn first.
        A control token in a message would end its turn or stand for an image: texts are
        neutralised. Neighbouring texts run as one, so that a tokenizer sees each run as a whole.
        """
        parts: list[PromptPart] = [self.turn_close] if goes_on else []
        system = self.system if system is None else system
        if system and not goes_on and messages[0].role != "system":
            messages = [Message("system", (system,)), *messages]
        for message in messages:
            parts.append(self.turn_open.format(role=message.role))
            parts += self._neutral(_joined(message.parts))
            parts.append(self.turn_close)
        parts.append(self.turn_open.format(role="assistant"))
        return Prompt(tuple(_joined(parts)))

    def text(self, prompt: Prompt) -> str:
        """The exact text that is tokenised, one pad per vision segment before expansion."""
        return "".join(map(self._written, prompt.parts))

    def _written(self, part: PromptPart) -> str:
        if isinstance(part, Segment):
            pad = self.image_pad if part.is_image else self.video_pad
            return self.vision_start + pad + self.vision_end
        return part if isinstance(part, str) else part.text

    def _neutral(self, parts: Iterable[PromptPart]) -> Iterator[PromptPart]:
        """A space goes into what begins a control token, be it in one text or in two."""
        first, rest = self.control[0], self.control[1:]
        before = ""
        for part in parts:
            if isinstance(part, Segment | Marker):
                before = ""
                yield part
                continue
            text = self._written(part).replace(self.control, f"{first} {rest}")
            if before.endswith(first) and text.startswith(rest):
                text = " " + text
            before = text or before
            yield TimeLabel(text) if isinstance(part, TimeLabel) else text


def _joined(parts: Iterable[PromptPart]) -> list[PromptPart]:
    """Neighbouring texts as one, no empty ones."""
    joined: list[PromptPart] = []
    for part in parts:
        if isinstance(part, str) and joined and isinstance(joined[-1], str):
            joined[-1] += part
        elif part != "":
            joined.append(part)
    return joined
