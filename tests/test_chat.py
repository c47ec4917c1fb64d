"""Chat is transformers' chat: its template, its processor, its generate."""

from __future__ import annotations

import base64
import io
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from transformers_tools import Clip, Image, TransformersPeer
from utils import LOOK, tiny_checkpoint, tiny_qwen3_vl

from vtts_rt import BadMedia, BadRequest, PerceptionConfig, Reply, Runtime, SamplingParams
from vtts_rt.models.qwen2_5_vl import GEOMETRY

PIXEL = GEOMETRY.token_px**2
GREEDY = SamplingParams(max_tokens=8, ignore_eos=True)
LOOK_AT = PerceptionConfig(parity="transformers", **LOOK)
# As in the tokenizer_config.json of Qwen2.5-VL: a system turn where there is none, parts in order.
# That of Qwen3-VL writes no such turn.
TEMPLATE = """{%- for m in messages -%}
{%- if loop.first and m.role != 'system' -%}
{{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' -}}
{%- endif -%}
{{- '<|im_start|>' + m.role + '\n' -}}
{%- if m.content is string -%}{{- m.content -}}{%- else -%}
{%- for part in m.content -%}
{%- if part.type == 'text' -%}{{- part.text -}}{%- else -%}
{{- '<|vision_start|><|' + part.type + '_pad|><|vision_end|>' -}}
{%- endif -%}{%- endfor -%}{%- endif -%}
{{- '<|im_end|>\n' -}}
{%- endfor -%}
{{- '<|im_start|>assistant\n' -}}"""


@pytest.fixture(scope="module")
def peer(checkpoint: Path) -> TransformersPeer:
    return TransformersPeer(checkpoint)


@pytest.fixture(scope="module")
def runtime(checkpoint: Path) -> Iterator[Runtime]:
    with Runtime.from_pretrained(checkpoint, dtype="float32", device="cpu") as runtime:
        yield runtime


def conversation(seed: int) -> list[dict[str, Any]]:
    rng, dice = np.random.default_rng(seed), random.Random(seed)

    def pixels(*shape: int) -> np.ndarray:
        return rng.integers(0, 256, (*shape, 3), dtype=np.uint8)

    def user() -> dict[str, Any]:
        parts: list[dict[str, Any]] = [{"type": "text", "text": "Which pattern, naïve café?"}]
        for _ in range(dice.randint(0, 2)):
            kind = dice.choice(["image", "video"])
            shape = [dice.randint(4, 30)] * (kind == "video") + [dice.randint(32, 90)] * 2
            parts.insert(dice.randint(0, len(parts)), {"type": kind, kind: pixels(*shape)})
        return {"role": "user", "content": parts}

    messages = [user()]
    if seed % 2:
        messages = [
            {"role": "system", "content": "Answer in one word."},
            user(),
            {"role": "assistant", "content": "red"},
            user(),
        ]
    return messages


@pytest.mark.parametrize("seed", range(4))
def test_chat_is_transformers_chat(peer: TransformersPeer, runtime: Runtime, seed: int) -> None:
    text, reply = same_reply(peer, runtime, conversation(seed), least_pixels=2 * PIXEL)
    assert reply.prompt == text
    assert reply.finish_reason == "length" and reply.timings.total > 0.0
    told = reply.transcript
    assert told.token_ids[told.generated].tolist() == reply.token_ids


@pytest.mark.parametrize("seed", [1, 2])
def test_chat_of_qwen3_vl_is_transformers_chat(tmp_path: Path, seed: int) -> None:
    """Its processor writes every pair behind its time."""
    folder = tiny_checkpoint(tmp_path, tiny_qwen3_vl)
    with Runtime.from_pretrained(folder, device="cpu") as runtime:
        template = TEMPLATE.replace("loop.first and", "false and")
        peer = TransformersPeer(folder)
        same_reply(peer, runtime, conversation(seed), least_pixels=1, template=template)


def same_reply(
    peer: TransformersPeer,
    runtime: Runtime,
    messages: list[dict[str, Any]],
    least_pixels: int,
    template: str = TEMPLATE,
) -> tuple[str, Reply]:
    """transformers' text, and our reply, which is transformers'."""
    config = PerceptionConfig(
        parity="transformers",
        sample_fps=2.0,
        max_frames=8,
        min_pixels=least_pixels,
        total_pixels=768 * 32 * 32 * 32,  # every frame and image may have 768 tokens
    )
    reply = runtime.chat(messages, source_fps=8.0, perception=config, sampling=GREEDY)
    text = peer.processor.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=True
    )
    given = [
        part[part["type"]]
        for message in messages
        if not isinstance(message["content"], str)
        for part in message["content"]
        if part["type"] != "text"
    ]
    size = least_pixels, 768 * runtime.engine.model.geometry.token_px**2
    media: list[Clip | Image] = []
    for content, segment in zip(given, reply.plan.segments, strict=True):
        if segment.is_image:
            media.append(Image(content, size))
        else:
            shown = list(dict.fromkeys(segment.frame_indices))
            media.append(Clip(content[shown], shown, len(content), 8.0, size))
    theirs = peer.generate(text, media, 8)
    assert reply.token_ids == theirs.token_ids
    assert reply.prompt_tokens == theirs.num_prompt_tokens
    assert reply.logprobs == pytest.approx(theirs.logprobs, abs=2e-4)
    return text, reply


def test_a_second_turn_prefills_only_what_is_new(runtime: Runtime, clip: Path) -> None:
    first: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "video", "video": clip}, "which?"]}
    ]
    options: Any = {"perception": LOOK_AT, "sampling": GREEDY}
    runtime.clear_caches()
    one = runtime.chat(first, **options)
    official = runtime.ask(
        clip,
        "which?",
        perception=PerceptionConfig(
            strategy="official", max_rounds=1, parity="transformers", **LOOK
        ),
        sampling=GREEDY,
    )
    assert one.frames == official.rounds[0].frames
    assert one.plan.segments == official.rounds[0].plan.segments
    assert one.reuse.pairs_encoded == one.plan.num_pairs > 2
    more = [{"role": "assistant", "content": "red"}, {"role": "user", "content": "and then?"}]
    two = runtime.chat([*first, *more], **options)
    assert (two.reuse.frames_decoded, two.reuse.pairs_encoded) == (0, 0)
    assert two.reuse.tokens_reused >= one.prompt_tokens - 1
    new = "red<|im_end|>\n<|im_start|>user\nand then?<|im_end|>\n<|im_start|>assistant\n"
    added = runtime.engine.tokenizer.count(new)
    assert two.prompt_tokens - one.prompt_tokens == added
    assert two.reuse.tokens_prefilled <= added + 1
    assert two.reuse.text_tokens_prefilled == two.reuse.tokens_prefilled


def test_what_a_part_may_be(runtime: Runtime, clip: Path) -> None:
    def said(*parts: Any, **options: Any) -> list[int]:
        messages = [{"role": "user", "content": [*parts, {"type": "text", "text": "which?"}]}]
        return runtime.chat(messages, perception=LOOK_AT, sampling=GREEDY, **options).token_ids

    expected = said({"type": "video", "video": clip})
    url = {"url": f"file://{clip}"}
    with runtime.open(clip) as video:
        assert said({"type": "video", "video": video}) == expected
    assert said({"type": "video", "video": clip.read_bytes()}) == expected
    assert said({"type": "video_url", "video_url": url}, allow_urls=True) == expected
    assert said({"type": "video_url", "video_url": str(clip)}) == expected
    with pytest.raises(BadRequest, match="a local path unless URLs are allowed"):
        said({"type": "video_url", "video_url": url})
    with pytest.raises(BadMedia):
        said({"type": "video", "video": "/nowhere.mp4"})
    with pytest.raises(BadRequest, match=r"^chat: messages\[0\] content\[0\] must be an image"):
        said({"type": "image", "image": clip})
    with pytest.raises(TimeoutError):
        said({"type": "video", "video": clip}, timeout_seconds=1e-9)
    long, some = "many words " * 100_000, SamplingParams(max_tokens=10**7)
    for content, sampling in ((long, None), ("which?", some)):
        with pytest.raises(BadRequest, match="^chat: prompt plus max_tokens must be <= "):
            runtime.chat([{"role": "user", "content": content}], sampling=sampling)
    text = runtime.chat([{"role": "user", "content": "<|im_end|>"}], sampling=GREEDY)
    assert "< |im_end|>" in text.prompt and text.frames == ()


def test_data_urls(runtime: Runtime) -> None:
    held = io.BytesIO()
    PIL.Image.fromarray(np.arange(64 * 48 * 3, dtype=np.uint8).reshape(48, 64, 3)).save(held, "PNG")
    text = base64.b64encode(held.getvalue()).decode()

    def said(part: dict[str, Any]) -> list[int]:
        return runtime.chat([{"role": "user", "content": [part]}], sampling=GREEDY).token_ids

    def by_url(url: str) -> list[int]:
        return said({"type": "image_url", "image_url": {"url": url}})

    expected = said({"type": "image", "image": held.getvalue()})
    assert by_url(f"data:image/png;base64,{text}") == expected
    for url in (f"data:image/png,{text}", f"data:image/png;base64,{text[:-1]}", "data:"):
        with pytest.raises(BadRequest, match=r"content\[0\] image_url must be a data URL"):
            by_url(url)


def test_messages_and_media_are_bounded_before_any_is_opened(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vtts_rt.rounds.prepare.open_video", None)
    most = runtime.engine.token_budget
    for messages in (
        [USER] * (most + 1),
        [{"role": "user", "content": [{"type": "image", "image": b""}] * most}],
    ):
        with pytest.raises(BadRequest, match=f"^chat: messages must be at most {most} with"):
            runtime.chat(messages)


USER = {"role": "user", "content": "which?"}


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (3, "messages must be a list of messages, got 3"),
        ([], "messages must be a list of messages"),
        ("hello", "messages must be a list of messages"),
        (["hello"], r"messages\[0\] must be a mapping"),
        ([{"role": "tool", "content": ""}], r"messages\[0\] role must be one of system, user"),
        ([{"role": ["user"], "content": ""}], r"messages\[0\] role must be one of"),
        ([{"role": "user"}], r"messages\[0\] content must be a text or a list of parts, got None"),
        ([USER, {"role": "assistant", "content": "B"}], r"messages\[1\] role must be user"),
        ([{"role": "user", "content": [3]}], r"messages\[0\] content\[0\] must be a mapping"),
        ([{"role": "user", "content": [{"type": "audio"}]}], r"messages\[0\] content\[0\] must be"),
        ([{"role": "user", "content": [{"type": "video"}]}], r"messages\[0\] content\[0\] must be"),
        ([{"role": "user", "content": [{"type": "text", "text": 3}]}], r".* text must be a text"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
            r"messages\[0\] content\[0\] image_url must be a text, got None",
        ),
        ([{"role": "user", "content": "\ud800"}], "prompt must be valid Unicode"),
    ],
)
def test_messages_that_are_none(runtime: Runtime, messages: Any, message: str) -> None:
    with pytest.raises(BadRequest, match=f"^chat: {message}") as error:
        runtime.chat(messages)
    assert "\n" not in str(error.value)


def test_options_are_checked(runtime: Runtime) -> None:
    with pytest.raises(TypeError, match="^chat: unexpected argument 'strategy'"):
        runtime.chat([USER], strategy="append")  # type: ignore[call-arg]
    with pytest.raises(BadRequest, match="^chat: sampling must be a SamplingParams or None"):
        runtime.chat([USER], sampling=3)  # type: ignore[typeddict-item]
