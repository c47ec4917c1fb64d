"""Chat: messages with images and videos, as OpenAI writes them, answered after one look."""

from __future__ import annotations

import base64
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import chain, groupby
from typing import Any, NamedTuple, TypeAlias

from vtts_rt import process
from vtts_rt.checks import check_names
from vtts_rt.config import ResolvedPerception
from vtts_rt.engine.sequence import GenerationRequest
from vtts_rt.perception.chat import Message
from vtts_rt.perception.layout import Turn, with_labels
from vtts_rt.perception.plan import FramePlan
from vtts_rt.perception.strategy import plan_round
from vtts_rt.rounds.ask import Ask, OpeningOptions, Perception
from vtts_rt.rounds.driver import Driver
from vtts_rt.rounds.prepare import Resources, deadline_of, fewest_new
from vtts_rt.rounds.results import Reply, reply_of
from vtts_rt.rounds.tokens import complete, encode
from vtts_rt.rounds.transcript import Transcript
from vtts_rt.types import Prompt, PromptPart, SamplingParams, require
from vtts_rt.video.store import StoreProvider

# {"role": "system" | "user" | "assistant", "content": a text or a list of parts}; a part is
# {"type": "text", "text": ...}, {"type": "image" | "video", <type>: ...} with what `ask` takes as a
# video, or {"type": "image_url" | "video_url", <type>: {"url": ...}}.
ChatMessage: TypeAlias = Mapping[str, object]
ROLES = ("system", "user", "assistant")
_KINDS = ("text", "image", "image_url", "video", "video_url")


class ChatOptions(OpeningOptions, total=False):
    """Keyword arguments of `Runtime.chat`; see Ask."""

    perception: Perception | None
    sampling: SamplingParams | None
    timeout_seconds: float | None


class _Media(NamedTuple):
    where: str
    is_image: bool
    content: Any


def chat(
    driver: Driver,
    resources: Resources,
    messages: Sequence[ChatMessage],
    options: ChatOptions,
    called: float,
) -> Reply:
    """See `Runtime.chat`. called: `time.monotonic()` of the call."""
    check_names("chat", options, ChatOptions.__annotations__)
    turns = read_messages(messages)
    media = [part for _, parts in turns for part in parts if isinstance(part, _Media)]
    num, most = len(turns) + len(media), resources.engine.token_budget
    rule = f"at most {most} with their images and videos, of a token each"
    require("chat", "messages", num, num <= most, rule)
    # It checks the options; without media it holds a video that is never opened.
    ask = Ask([item.content for item in media] or "none", "chat", **options, what="chat")
    began = time.perf_counter()
    with ExitStack() as stack, driver.admit() as ticket:
        plan, prompt, provider, request = _look(resources, stack, ask, turns, media, called)
        stack.callback(provider.cancel)
        (completion,) = complete(driver, [request], ticket)
        return reply_of(
            Reply,
            completion,
            provider,
            began,
            prompt=resources.engine.model.chat.text(prompt),
            plan=plan,
            transcript=Transcript.of_round(request.prompt, completion, request.parity, None),
        )


def read_messages(messages: Sequence[ChatMessage]) -> list[tuple[str, list[str | _Media]]]:
    """(role, parts) of each turn. BadRequest names the first that is not as `ChatMessage` says."""
    several = isinstance(messages, Sequence) and not isinstance(messages, str | bytes)
    ok = several and len(messages) > 0
    require("chat", "messages", messages, ok, "a list of messages")
    turns = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        require("chat", where, message, isinstance(message, Mapping), "a mapping")
        role, content = message.get("role"), message.get("content")
        known = isinstance(role, str) and role in ROLES
        require("chat", f"{where} role", role, known, f"one of {', '.join(ROLES)}")
        ok = isinstance(content, str | list | tuple)
        require("chat", f"{where} content", content, ok, "a text or a list of parts")
        parts: Any = [content] if isinstance(content, str) else content
        said = [_part(part, f"{where} content[{i}]") for i, part in enumerate(parts)]
        turns.append((str(role), said))
    last = turns[-1][0]
    require("chat", f"messages[{len(turns) - 1}] role", last, last == "user", "user, as the last")
    return turns


def _part(part: Any, where: str) -> str | _Media:
    if isinstance(part, str):
        return part
    kind = str(part.get("type")) if isinstance(part, Mapping) else ""
    rule = f"a mapping with a type of {', '.join(_KINDS)} and what is named so"
    require("chat", where, part, kind in _KINDS and kind in part, rule)
    content: Any = part[kind]
    if kind in ("image_url", "video_url") and isinstance(content, Mapping):
        content = content.get("url")
    if kind in ("text", "image_url", "video_url"):
        require("chat", f"{where} {kind}", content, isinstance(content, str), "a text")
    if kind.endswith("_url") and content.startswith("data:"):
        head, _, data = content.partition(",")
        try:
            content = base64.b64decode(data if head.endswith(";base64") else "-", validate=True)
        except ValueError:
            require("chat", f"{where} {kind}", content, False, "a data URL in base64")
    return content if kind == "text" else _Media(where, kind.startswith("image"), content)


@process.native_calls()
def _look(
    resources: Resources,
    stack: ExitStack,
    ask: Ask,
    turns: Sequence[tuple[str, Sequence[str | _Media]]],
    media: Sequence[_Media],
    called: float,
) -> tuple[FramePlan, Prompt, StoreProvider, GenerationRequest]:
    """What the model is shown: the media opened, the conversation laid out."""
    config, engine = resources.perception(ask.perception), resources.engine
    sources = resources.open(stack, ask, called) if media else []
    videos = [source.metadata for source in sources]
    for item, video in zip(media, videos, strict=True):
        kind = "an image" if item.is_image else "a video"
        got = "an image" if video.is_image else "a video"
        require("chat", item.where, got, got == kind, kind)
    plan = FramePlan(0, (), (), (), config.sample_fps, ())
    if videos:
        plan = plan_round("official", config, videos, [], 0)
    templates, shown = resources.prompts(config), _written(resources, config, plan)
    messages = []
    for role, said in turns:
        parts = [[p] if isinstance(p, str) else next(shown) for p in said]
        messages.append(Message(role, tuple(chain.from_iterable(parts))))
    prompt = engine.model.chat.render(messages, system=templates.system)
    provider = resources.store.provider(sources)
    sampling = ask.sampling or SamplingParams()
    request = GenerationRequest(
        encode(engine, "chat", prompt, fewest_new(sampling)),
        provider=provider,
        sampling=sampling,
        parity=config.parity,
        deadline_seconds=deadline_of(ask, called),
    )
    return plan, prompt, provider, request


def _written(
    resources: Resources, config: ResolvedPerception, plan: FramePlan
) -> Iterator[list[PromptPart]]:
    """The segments of each video, as a family writes them (pair by pair, behind times)."""
    chat, templates = resources.engine.model.chat, resources.prompts(config)
    for _, run in groupby(plan.segments, lambda segment: segment.pairs[0].video):
        of_one = replace(plan, segments=tuple(run))
        look = (False, False, False, False)
        turn = Turn(chat, templates, "", of_one, *look, config.video_wrapper)
        yield with_labels(turn, lambda *_: "", headings=False)
