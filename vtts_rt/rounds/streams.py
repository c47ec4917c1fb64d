"""What a driver makes of one request, for the thread or coroutine that waits for it."""

from __future__ import annotations

import asyncio
import queue
import time
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import ExitStack, closing
from typing import Any, TypeVar

from vtts_rt import process
from vtts_rt.rounds.ask import Listener
from vtts_rt.rounds.driver import Driver, Ticket
from vtts_rt.rounds.prepare import RoundRequest
from vtts_rt.rounds.results import Answer, AnswerReady, RoundEvent
from vtts_rt.rounds.scheduler import Output, RequestFailed

# Opens the videos of an Ask, which the stack closes.
Opener = Callable[[ExitStack], RoundRequest]

T = TypeVar("T")


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

        request = await in_thread(opened)
        driver.submit(ticket, request, deliver)
        event: RoundEvent | None = None
        while not isinstance(event, AnswerReady):
            event = told(await _next_async(outputs, request, ticket))
            yield event
            driver.check_process()


async def in_thread(function: Callable[[], T]) -> T:
    """What `function` returns, run on a thread beside the event loop."""
    try:
        return await asyncio.to_thread(function)
    except RuntimeError:
        if process.is_ending():  # executors take no more work
            process.wait_for_end()
        raise


def answered(events: Generator[RoundEvent, None, None], on_event: Listener | None = None) -> Answer:
    """The answer at the end of a stream; `on_event` sees what comes before."""
    with closing(events):  # whatever keeps an error of `on_event`, and with it this frame
        for event in events:
            if isinstance(event, AnswerReady):
                return event.answer
            if on_event is not None:
                on_event(event)
    raise AssertionError("a stream ends with its answer")


async def answered_async(events: AsyncGenerator[RoundEvent, None]) -> Answer:
    """The answer at the end of an asynchronous stream."""
    async for event in events:
        if isinstance(event, AnswerReady):
            return event.answer
    raise AssertionError("a stream ends with its answer")


def _next(outputs: queue.SimpleQueue[Output], request: RoundRequest, ticket: Ticket) -> Output:
    try:
        return outputs.get(timeout=seconds_left(request.deadline_seconds, ticket))
    except queue.Empty:
        return timed_out(request)


async def _next_async(
    outputs: asyncio.Queue[Output], request: RoundRequest, ticket: Ticket
) -> Output:
    try:
        seconds = seconds_left(request.deadline_seconds, ticket)
        return await asyncio.wait_for(outputs.get(), seconds)
    except asyncio.TimeoutError:
        return timed_out(request)


def seconds_left(deadline_seconds: float | None, ticket: Ticket) -> float | None:
    """How long to wait for the next output before the request has `timed_out`. None: until it
    comes, as the driver ends in time what it has begun."""
    if deadline_seconds is None or ticket.request_id is not None:
        return None
    return max(0.0, deadline_seconds - time.monotonic())


def timed_out(request: RoundRequest) -> AnswerReady:
    """The end of a request whose time passes before the driver has begun it."""
    return AnswerReady(request.answer("timeout"))


def told(output: Output) -> Any:
    """The event, or the completions, that an output is. A failure is raised."""
    if isinstance(output, RequestFailed):
        try:
            raise output.error
        finally:
            del output  # the error's traceback holds this frame
    return output
