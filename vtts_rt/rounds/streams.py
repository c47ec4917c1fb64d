"""What a driver makes of one request, for the thread or coroutine that waits for it."""

from __future__ import annotations

import asyncio
import queue
import time
from collections.abc import AsyncGenerator, Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, closing

from vtts_rt import process
from vtts_rt.checks import UNICODE, Rule, check, is_whole
from vtts_rt.engine.engine import Engine
from vtts_rt.engine.sequence import Completion, GenerationRequest
from vtts_rt.errors import BadRequest
from vtts_rt.models.tokenizer import EncodedPrompt, encode_prompt, least_tokens
from vtts_rt.rounds.ask import SAMPLING, Listener
from vtts_rt.rounds.driver import Driver, Ticket
from vtts_rt.rounds.prepare import RoundRequest
from vtts_rt.rounds.results import Answer, AnswerReady, RoundEvent
from vtts_rt.rounds.scheduler import Output, RequestFailed
from vtts_rt.types import Prompt, SamplingParams, TimeLabel, require

# Opens the videos of an Ask, which the stack closes.
Opener = Callable[[ExitStack], RoundRequest]


def stream(driver: Driver, open_request: Opener) -> Generator[RoundEvent, None, None]:
    """The events up to the answer; closing the generator aborts the request."""
    outputs: queue.SimpleQueue[Output] = queue.SimpleQueue()
    with ExitStack() as stack, driver.admit() as ticket:
        request = open_request(stack)
        driver.submit(ticket, request, outputs.put)
        event: RoundEvent | None = None
        while not isinstance(event, AnswerReady):
            # In no variable: the traceback of an output's error will hold this frame.
            event = told(_next(outputs, request, ticket))
            yield event
            driver.check_process()


async def stream_async(driver: Driver, open_request: Opener) -> AsyncGenerator[RoundEvent, None]:
    """`stream` in an event loop; cancelling its task aborts the request, too."""
    loop = asyncio.get_running_loop()
    outputs: asyncio.Queue[Output] = asyncio.Queue()

    def deliver(output: Output) -> None:
        loop.call_soon_threadsafe(outputs.put_nowait, output)

    with ExitStack() as stack, driver.admit() as ticket:

        def opened() -> RoundRequest:
            try:
                return open_request(stack)
            finally:
                if ticket.aborted:  # cancelled meanwhile
                    stack.close()

        try:
            request = await asyncio.to_thread(opened)
        except RuntimeError:
            if process.is_ending():  # executors take no more work
                process.wait_for_end()
            raise
        driver.submit(ticket, request, deliver)
        event: RoundEvent | None = None
        while not isinstance(event, AnswerReady):
            event = told(await _next_async(outputs, request, ticket))
            yield event
            driver.check_process()


def answered(events: Generator[RoundEvent, None, None], on_event: Listener | None = None) -> Answer:
    """The answer at the end of a stream; `on_event` sees what comes before."""
    with closing(events):  # whatever keeps an error of `on_event`, and with it this frame
        for event in events:
            if isinstance(event, AnswerReady):
                return event.answer
            if on_event is not None:
                on_event(event)
    raise AssertionError("a stream ends with its answer")


def _next(outputs: queue.SimpleQueue[Output], request: RoundRequest, ticket: Ticket) -> Output:
    try:
        return outputs.get(timeout=seconds_left(request, ticket))
    except queue.Empty:
        return timed_out(request)


async def _next_async(
    outputs: asyncio.Queue[Output], request: RoundRequest, ticket: Ticket
) -> Output:
    try:
        return await asyncio.wait_for(outputs.get(), seconds_left(request, ticket))
    except asyncio.TimeoutError:
        return timed_out(request)


def seconds_left(request: RoundRequest, ticket: Ticket) -> float | None:
    """How long to wait for the next output before the request has `timed_out`. None: until it
    comes, as the driver ends in time what it has begun."""
    if request.deadline_seconds is None or ticket.request_id is not None:
        return None
    return max(0.0, request.deadline_seconds - time.monotonic())


def timed_out(request: RoundRequest) -> AnswerReady:
    """The end of a request whose time passes before the driver has begun it."""
    return AnswerReady(request.answer("timeout"))


def told(output: Output) -> RoundEvent:
    """The event that an output is. A failure is raised."""
    if isinstance(output, RequestFailed):
        try:
            raise output.error
        finally:
            del output  # the error's traceback holds this frame
    assert not isinstance(output, Completion)
    return output


# -- tokens without rounds ------------------------------------------------------------------------


def _is_prompt(value: object) -> bool:
    parts = value.parts if isinstance(value, Prompt) else (value,)
    return all(isinstance(part, str | TimeLabel) for part in parts)


_TOKEN_RULES: dict[str, Rule] = {
    "prompt": (_is_prompt, "text only, or a Prompt of text, without vision segments (use ask)"),
    "sampling": SAMPLING,
    "token_ids": (
        lambda v: not isinstance(v, Mapping) and all(is_whole(i) and i >= 0 for i in v),
        "a list of token ids",
    ),
}


def generation(
    engine: Engine, prompt: str | Prompt, sampling: SamplingParams | None
) -> GenerationRequest:
    """The request of `Runtime.generate`; BadRequest for what it does not take."""
    check("generate", _TOKEN_RULES, {"prompt": prompt, "sampling": sampling})
    encoded = _encode_text(engine, "generate", prompt)
    return GenerationRequest(encoded, sampling=sampling or SamplingParams())


def scoring(engine: Engine, prompt: str | Prompt, token_ids: Sequence[int]) -> GenerationRequest:
    """The request of `Runtime.score`; BadRequest for what it does not take."""
    check("score", _TOKEN_RULES, {"prompt": prompt, "token_ids": token_ids})
    ids, size = [int(index) for index in token_ids], engine.model.config.language.vocab_size
    require("score", "token_ids", ids, max(ids, default=0) < size, f"ids below {size}")
    return GenerationRequest(_encode_text(engine, "score", prompt), forced_ids=ids)


@process.native_calls()
def _encode_text(engine: Engine, what: str, prompt: str | Prompt) -> EncodedPrompt:
    """The tokens of a text prompt; BadRequest where it has no chance to fit."""
    whole = Prompt((prompt,)) if isinstance(prompt, str) else prompt
    check(what, {"prompt": UNICODE}, {"prompt": engine.model.chat.text(whole)})
    budget = engine.token_budget
    num_tokens = least_tokens(engine.tokenizer, whole, budget)
    if num_tokens > budget:
        rule = f"prompt must be <= {budget} tokens"
        raise BadRequest(f"{what}: {rule}, got at least {num_tokens}")
    return encode_prompt(engine.tokenizer, whole)


def complete(driver: Driver, request: GenerationRequest) -> Completion:
    """The completion of a plain generation."""
    outputs: queue.SimpleQueue[Output] = queue.SimpleQueue()
    with driver.admit() as ticket:
        driver.submit(ticket, request, outputs.put)
        output = outputs.get()
    if isinstance(output, RequestFailed):
        try:
            raise output.error
        finally:
            del output  # the error's traceback holds this frame
    assert isinstance(output, Completion)
    return output
