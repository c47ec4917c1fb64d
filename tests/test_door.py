"""Wrong arguments of the public functions: one sentence that names the function and the argument,
before anything is opened, and the runtime answers all the same."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from utils import LOOK

from vtts_rt import (
    EngineConfig,
    FrameStore,
    PerceptionConfig,
    Runtime,
    RuntimeConfig,
    SamplingParams,
    open_video,
)
from vtts_rt.errors import BadRequest
from vtts_rt.rounds.ask import ASK_RULES, Ask, AskOptions, OpeningOptions
from vtts_rt.types import Prompt

SURROGATE = "caf\udce9?"  # what an argument with a byte that is not UTF-8 becomes
SHORT: dict[str, Any] = {
    "perception": PerceptionConfig(max_rounds=1, **LOOK),
    "sampling": SamplingParams(max_tokens=2),
}
CALLS = ("ask", "stream", "ask_async", "stream_async", "ask_batch", "plan")
OPTIONS = set(AskOptions.__annotations__)


@pytest.fixture(scope="module")
def runtime(checkpoint: Path) -> Iterator[Runtime]:
    with Runtime.from_pretrained(checkpoint, engine=EngineConfig(kv_bytes=1 << 20)) as runtime:
        yield runtime


@pytest.fixture()
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The videos that were opened."""
    opened: list[Any] = []

    def noted(video: Any, **more: Any) -> Any:
        opened.append(video)
        return open_video(video, **more)

    monkeypatch.setattr("vtts_rt.rounds.prepare.open_video", noted)
    return opened


def call(runtime: Runtime, function: str, /, **arguments: Any) -> Any:
    """Call one of CALLS to its end; of a batch, the second request has the arguments."""
    arguments = {"video": "/nowhere.mp4", "question": "which?"} | arguments
    if function == "ask_batch":
        good = {"video": "/nowhere.mp4", "question": "which?"}
        return runtime.ask_batch([good, arguments])
    result = getattr(runtime, function)(**arguments)
    if function == "stream":
        return list(result)
    if function == "ask_async":
        return asyncio.run(result)
    if function == "stream_async":

        async def last() -> list[Any]:
            return [event async for event in result]

        return asyncio.run(last())
    return result


def named(function: str) -> str:
    return "ask_batch requests[1]" if function == "ask_batch" else function


@pytest.mark.parametrize("function", CALLS)
def test_an_unknown_name_is_reported_by_the_function(
    runtime: Runtime, opened: list[Any], function: str
) -> None:
    near = "option", "options"
    with pytest.raises(TypeError) as error:
        call(runtime, function, option=["a"])
    text = f"{named(function)}: unexpected argument {near[0]!r}; did you mean {near[1]!r}?"
    assert str(error.value) == text
    for name in ("what", "function", "model", "templates", "stack", "called", "xyz"):
        with pytest.raises(TypeError) as error:
            call(runtime, function, **{name: 1})
        assert str(error.value).startswith(f"{named(function)}: unexpected argument {name!r}; ")
    assert not opened


def test_names_that_belong_to_other_functions(runtime: Runtime) -> None:
    for function in ("stream", "ask_async", "stream_async", "plan"):
        with pytest.raises(TypeError, match=f"^{function}: unexpected argument 'on_event'"):
            call(runtime, function, on_event=print)


def test_an_ask_and_its_options_have_the_same_names_and_types() -> None:
    own = {name: value for name, value in Ask.__annotations__.items() if name != "what"}
    for name in ("videos", "question", "_"):
        del own[name]
    assert own == {name: hint.__forward_arg__ for name, hint in AskOptions.__annotations__.items()}
    assert set(own) == set(ASK_RULES) - {"video", "videos", "question"}
    opening = set(inspect.signature(open_video).parameters) - {"video", "deadline_seconds"}
    assert set(OpeningOptions.__annotations__) == opening


# Argument of a question, what it must not be, and words of its rule.
WRONG: list[tuple[str, Any, str]] = [
    *(("question", value, "a text that is not blank") for value in (3, None, "", " \n", b"which?")),
    ("question", SURROGATE, "valid Unicode"),
    *(
        ("options", value, "a list of at most 26 texts, none blank")
        for value in (None, 3, "ab", {"a": 1}, ["a", 3], ["a", " "], ["a", None], ["x"] * 27)
    ),
    ("options", ["a", "\ud800"], "valid Unicode"),
    *(("context", value, "a text") for value in (3, None, b"words", ["words"])),
    ("context", "words " * 1000 + SURROGATE, "valid Unicode"),
    *(("sampling", value, "a SamplingParams or None") for value in ({}, {"seed": 1}, 3, "x")),
    *(
        ("perception", value, "a PerceptionConfig or None")
        for value in ({"max_rounds": 2}, "append", SamplingParams())
    ),
    *(
        ("timeout_seconds", value, "> 0 seconds")
        for value in ("a", "1", 0, -1, True, float("nan"), float("inf"), 1e300, [1], np.zeros(2))
    ),
    *(("member", value, "a whole number in") for value in (-1, True, "1", 1.0, 2**63)),
    *(
        ("assume_clues", value, "None or a list with a clue a round")
        for value in (
            3,
            "[[1, 2]]",
            {"spans": [[1, 2]]},
            [[1, 2]],
            [[[1, 2, 3]]],
            [[["1", "2"]]],
            [[[float("nan"), 2]]],
            [{"boxes": [[0, 0, 2, 2]]}],
            [{"span": [[1, 2]]}],
        )
    ),
    *(("source_fps", value, "a number in") for value in ("8", 0, -1, True, float("nan"), [8])),
    *(
        (name, value, "seconds >= 0")
        for name in ("start_seconds", "end_seconds")
        for value in ("1", -1, True, float("nan"), [1])
    ),
    *(("allow_urls", value, "True or False") for value in ("yes", 1, None)),
    *(("decoder", value, "one of auto") for value in ("best", 3, ["pyav"])),
    *(("limits", value, "a MediaLimits or None") for value in ({}, {"max_frames": 3}, 3)),
    *(("device", value, "the number of a GPU or None") for value in ("cuda", -1, True)),
    *(("timestamps_seconds", value, "a list of times") for value in (3, "0 1")),
    *(("on_event", value, "a function or None") for value in (3, "print", [print])),
    *(("video", value, "at least one video") for value in ([], ())),
]


def one_sentence(error: ValueError, what: str, argument: str, rule: str) -> None:
    text = str(error)
    assert text.startswith(f"{what}: {argument} must be {rule}") and ", got " in text, text
    assert "\n" not in text and len(text) < 700


def test_wrong_values_are_one_sentence(runtime: Runtime, opened: list[Any]) -> None:
    for argument, value, rule in WRONG:
        with pytest.raises(ValueError) as error:
            call(runtime, "ask", **{argument: value})
        one_sentence(error.value, "ask", argument, rule)
    assert not opened and runtime.stats()["frame_store"]["queries"] == 0
    assert len(runtime.generate("hello", SamplingParams(max_tokens=2)).token_ids) == 2


def test_every_function_checks_every_argument(runtime: Runtime, opened: list[Any]) -> None:
    for function in CALLS:
        known = OPTIONS | {"video", "question"}
        if function in ("ask", "ask_batch"):
            known = known | {"on_event"}
        for argument, value, rule in {name: (name, v, r) for name, v, r in WRONG}.values():
            if argument in known:
                with pytest.raises(ValueError) as error:
                    call(runtime, function, **{argument: value})
                one_sentence(error.value, named(function), argument, rule)
    for tokens in (0, True, "2"):
        with pytest.raises(ValueError, match="^plan: max_tokens must be a whole number >= 1"):
            call(runtime, "plan", max_tokens=tokens)
    assert not opened


def test_arguments_that_contradict_each_other(runtime: Runtime, opened: list[Any]) -> None:
    with pytest.raises(ValueError, match="^ask: end_seconds must be greater than start_seconds"):
        call(runtime, "ask", start_seconds=3, end_seconds=2)
    with pytest.raises(ValueError, match="^stream: timestamps_seconds must be a list of 2"):
        call(runtime, "stream", video=["a", "b"], timestamps_seconds=[[0, 1]])
    assert not opened


NOTHING = (None, True, 3, -1, 0.5, float("nan"), 10**400, "x", b"x", "", [], [[]], {}, object())


def test_rules_take_a_value_or_refuse_it_in_one_sentence(
    runtime: Runtime, opened: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the value is: nothing else is raised, and nothing begins."""
    monkeypatch.setattr("vtts_rt.runtime.open_request", print)
    values = (*NOTHING, np.zeros(3), torch.zeros(2), [np.zeros(2)], {"spans": object()}, "\ud800")
    refused = 0
    arguments = ["video", "question", *OPTIONS]
    for argument in arguments:
        for value in values:
            try:
                runtime.stream(**{"video": "a", "question": "q", argument: value})
            except ValueError as error:
                one_sentence(error, "stream", argument, "")
                refused += 1
    assert refused > len(arguments) * len(values) // 2 and not opened


def test_a_wrong_request_of_a_batch(runtime: Runtime, clips: list[Path], opened: list[Any]) -> None:
    good = {"video": clips[0], "question": "which?", **SHORT}
    wrong = [3, {"video": clips[0]}, good | {"sampling": {}}, good | {"sampel": 1}]
    told = [
        r"^ask_batch: requests\[1\] must be an Ask or a mapping of arguments, got 3$",
        r"^ask_batch requests\[1\]: missing argument 'question'$",
        r"^ask_batch requests\[1\]: sampling must be a SamplingParams or None, got \{\}$",
        r"^ask_batch requests\[1\]: unexpected argument 'sampel'; did you mean 'sampling'\?$",
    ]
    for request, match in zip(wrong, told, strict=True):
        with pytest.raises((TypeError, ValueError), match=match):
            runtime.ask_batch([good, request])  # type: ignore[list-item]
    for requests in (3, "ab", {"video": 1}, None):
        with pytest.raises(ValueError, match="^ask_batch: requests must be a list of requests"):
            runtime.ask_batch(requests)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="^ask_batch: return_exceptions must be True or False"):
        runtime.ask_batch([good], return_exceptions=1)  # type: ignore[arg-type]
    assert not opened
    outcomes = runtime.ask_batch([wrong[0], good, *wrong[1:]], return_exceptions=True)  # type: ignore[list-item]
    assert [type(o) for o in outcomes[:1] + outcomes[2:]] == [
        BadRequest, TypeError, BadRequest, TypeError,
    ]  # fmt: skip
    assert outcomes[1].stop_reason == "max_rounds" and opened == [clips[0]]


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        ("generate", {"prompt": 3}, "generate: prompt must be text"),
        ("generate", {"prompt": None}, "generate: prompt must be text"),
        ("generate", {"prompt": Prompt((3,))}, "generate: prompt must be text"),  # type: ignore[arg-type]
        ("generate", {"prompt": SURROGATE}, "generate: prompt must be valid Unicode"),
        ("generate", {"prompt": Prompt((SURROGATE,))}, "generate: prompt must be valid Unicode"),
        ("generate", {"prompt": "a", "sampling": {}}, "generate: sampling must be a Sampling"),
        ("generate", {"prompt": "a" * 99_999}, "generate: prompt plus max_tokens must be <="),
        ("score", {"prompt": 3, "token_ids": []}, "score: prompt must be text"),
        ("score", {"prompt": "", "token_ids": [1]}, "score: prompt must be non-empty"),
        ("score", {"prompt": "a", "token_ids": iter([1])}, "score: token_ids must be a list of"),
        ("score", {"prompt": "\ud800", "token_ids": [1]}, "score: prompt must be valid Unicode"),
        ("score", {"prompt": "a", "token_ids": 3}, "score: token_ids must be a list of token"),
        ("score", {"prompt": "a", "token_ids": "12"}, "score: token_ids must be a list of token"),
        ("score", {"prompt": "a", "token_ids": [1.0]}, "score: token_ids must be a list of token"),
        ("score", {"prompt": "a", "token_ids": [True]}, "score: token_ids must be a list of token"),
        ("score", {"prompt": "a", "token_ids": [-1]}, "score: token_ids must be a list of token"),
        ("score", {"prompt": "a", "token_ids": [1, 400]}, "score: token_ids must be ids below 400"),
        (
            "score",
            {"prompt": "a" * 99_999, "token_ids": [1]},
            "score: prompt plus token_ids must be",
        ),
        ("update_weights", {"tensors": 3}, "update_weights: tensors must be a mapping"),
        ("update_weights", {"tensors": [("a", 1)]}, "update_weights: tensors must be a mapping"),
        ("update_weights", {"tensors": {3: 1}}, "update_weights: tensors must be named as"),
        ("update_weights", {"tensors": {}, "finish": 1}, "update_weights: finish must be True or"),
        ("update_weights", {"tensors": {}, "in_flight": "x"}, "update_weights: in_flight must be"),
        ("update_weights", {"tensors": {}, "in_flight": []}, "update_weights: in_flight must be"),
        ("perception", {"perception": {}}, "perception: perception must be a PerceptionConfig"),
        ("from_pretrained", {"model": 3}, "Runtime: model must be 'tiny', a directory"),
        ("from_pretrained", {"model": ""}, "Runtime: model must be 'tiny', a directory"),
        ("from_pretrained", {"dtype": "x"}, "Runtime: dtype must be 'auto' or one of float32"),
        ("from_pretrained", {"dtype": torch.int8}, "Runtime: dtype must be 'auto' or one of"),
        ("from_pretrained", {"dtype": []}, "Runtime: dtype must be 'auto' or one of"),
        ("from_pretrained", {"device": 3}, "Runtime: device must be auto, cpu or cuda"),
        ("from_pretrained", {"quantization": "int3"}, "Runtime: quantization must be None or"),
        ("from_pretrained", {"engine": {}}, "Runtime: engine must be an EngineConfig or None"),
        ("from_pretrained", {"config": {}}, "Runtime: config must be a RuntimeConfig or None"),
        ("from_pretrained", {"frame_store": 3}, "Runtime: frame_store must be a FrameStore or"),
    ],
)
def test_the_other_functions(
    runtime: Runtime, function: str, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError) as error:
        getattr(runtime, function)(**arguments)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_the_constructor_checks_its_engine(runtime: Runtime) -> None:
    engine = runtime.engine
    with pytest.raises(ValueError, match="^Runtime: engine must be an EngineConfig or None"):
        Runtime(engine.model, engine.tokenizer, engine={})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value) for name in ("kv_bytes", "page_size") for value in ("1", True, 1.5, None)),
        *((name, -1) for name in ("kv_bytes", "draft_tokens")),
        *((name, 0) for name in ("page_size", "max_sequences", "max_wait_steps")),
        *(("prefix_cache", value) for value in (1, "no")),
        *(("max_batch_tokens", 64), ("max_sequences", 10**30), ("cuda_graphs", "yes")),
        ("vision_disk_path", 3),
    ],
)
def test_engine_settings(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^EngineConfig: {name} must be .*, got "):
        EngineConfig(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("threads", -1), ("frame_store_bytes", -1), ("max_queued_requests", 1.5)),
        *(("speculative_fetch", 1), ("decoder", 3), ("decoder", []), ("media_limits", {})),
    ],
)
def test_runtime_settings(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^RuntimeConfig: {name} must be .*, got "):
        RuntimeConfig(**{name: value})


def test_budgets_of_a_frame_store() -> None:
    for value in (-1, "1", True, 1.5, None):
        for name in ("byte_budget", "device_byte_budget"):
            match = f"^FrameStore: {name} must be a whole number of bytes >= 0, got "
            with pytest.raises(ValueError, match=match):
                FrameStore(**({"byte_budget": 1} | {name: value}))


def test_stop_texts_and_prompts_are_unicode(tmp_path: Path) -> None:
    for stop in (SURROGATE, ["a", "\ud800"]):
        with pytest.raises(ValueError, match="^SamplingParams: stop must be .* valid Unicode"):
            SamplingParams(stop=stop)
    from vtts_rt.perception.prompts import load_prompts

    (tmp_path / "prompts.json").write_text('{"look": "\\ud800"}')
    with pytest.raises(ValueError, match="^prompts: look must be valid Unicode"):
        load_prompts(tmp_path / "prompts.json")


def test_values_of_numpy_are_numbers(runtime: Runtime) -> None:
    frames = np.zeros((8, 56, 56, 3), np.uint8)
    answer = runtime.ask(
        frames,
        "which?",
        source_fps=np.float32(4),
        start_seconds=np.int64(0),
        timeout_seconds=np.float64(100),
        member=np.int64(1),
        **SHORT,
    )
    assert answer.videos[0].source_fps == 4.0
    ids = np.array(answer.rounds[0].token_ids)
    assert len(runtime.score("which?", ids)) == 2  # type: ignore[arg-type]


def test_open_video_says_it_in_one_sentence() -> None:
    frames = np.zeros((4, 56, 56, 3), np.uint8)
    for argument, value, rule in WRONG:
        if argument in ("source_fps", "start_seconds", "end_seconds", "allow_urls", "decoder"):
            with pytest.raises(ValueError) as error:
                open_video(frames, **{"source_fps": 2.0, argument: value})
            one_sentence(error.value, "open_video", argument, rule)
