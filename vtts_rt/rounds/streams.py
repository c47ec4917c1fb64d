"""What a driver makes of one request, for the thread or coroutine that waits for it."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import ExitStack

from vtts_rt import process
from vtts_rt.engine.sequence import Completion, GenerationRequest
from vtts_rt.rounds.driver import Driver, Ticket
from vtts_rt.rounds.question import Question, StreamEvent
from vtts_rt.rounds.scheduler import Output, RequestFailed

# Checks the arguments of a call and opens its videos, which the stack closes.
Opener = Callable[[ExitStack], Question]


def stream(driver: Driver, open_question: Opener) -> Generator[StreamEvent, None, None]:
    """The events up to the answer; closing the generator aborts the question."""
    outputs: queue.SimpleQueue[Output] = queue.SimpleQueue()
    with ExitStack() as stack:
        asked = open_question(stack)
        ticket = driver.submit(asked.request, outputs.put)
        try:
            while asked.answer is None:
                # In no variable: the traceback of an output's error will hold this frame.
                for event in asked.events(_next(outputs, asked, ticket)):
                    yield event
                    driver.check_process()
        finally:
            driver.abort(ticket)


async def stream_async(driver: Driver, open_question: Opener) -> AsyncGenerator[StreamEvent, None]:
    """`stream` in an event loop; cancelling its task aborts the question, too."""
    loop = asyncio.get_running_loop()
    outputs: asyncio.Queue[Output] = asyncio.Queue()

    def deliver(output: Output) -> None:
        loop.call_soon_threadsafe(outputs.put_nowait, output)

    with ExitStack() as stack:
        try:
            asked = await asyncio.to_thread(open_question, stack)
        except RuntimeError:
            if process.is_ending():  # executors take no more work
                process.wait_for_end()
            raise
        ticket = driver.submit(asked.request, deliver)
        try:
            while asked.answer is None:
                for event in asked.events(await _next_async(outputs, asked, ticket)):
                    yield event
                    driver.check_process()
        finally:
            driver.abort(ticket)


def _next(outputs: queue.SimpleQueue[Output], asked: Question, ticket: Ticket) -> Output:
    try:
        return outputs.get(timeout=asked.seconds_left(ticket))
    except queue.Empty:
        return asked.timed_out()


async def _next_async(outputs: asyncio.Queue[Output], asked: Question, ticket: Ticket) -> Output:
    try:
        return await asyncio.wait_for(outputs.get(), asked.seconds_left(ticket))
    except asyncio.TimeoutError:
        return asked.timed_out()


def complete(driver: Driver, request: GenerationRequest) -> Completion:
    """The completion of a plain generation."""
    outputs: queue.SimpleQueue[Output] = queue.SimpleQueue()
    ticket = driver.submit(request, outputs.put)
    try:
        output = outputs.get()
    except BaseException:
        driver.abort(ticket)
        raise
    if isinstance(output, RequestFailed):
        try:
            raise output.error
        finally:
            del output  # the error's traceback holds this frame
    assert isinstance(output, Completion)
    return output
