"""Batch: many questions of one caller at once, awaited on the caller's thread."""

from __future__ import annotations

import queue
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from typing import Any

from vtts_rt.rounds.driver import Driver, Ticket
from vtts_rt.rounds.question import Question
from vtts_rt.rounds.results import Answer, AnswerReady
from vtts_rt.rounds.scheduler import Output, RequestFailed

_MAX_OPENERS = 8  # threads that open videos; each of a long one reads and hashes with several


class _Member:
    """A request in work. question, ticket: None until its videos are open."""

    def __init__(self, on_event: Callable[[Any], None] | None) -> None:
        self.on_event = on_event
        self.stack = ExitStack()
        self.question: Question | None = None
        self.ticket: Ticket | None = None


class Batch:
    """Requests to one driver, at most `most` of them open at a time.

    open_question: opens the videos of a request into the stack. refused: by index, what becomes
    of requests that cannot be asked.
    """

    def __init__(
        self,
        driver: Driver,
        open_question: Callable[..., Question],
        requests: Sequence[Mapping[str, Any]],
        most: int,
        refused: Mapping[int, Exception],
    ) -> None:
        self._driver = driver
        self._open_question = open_question
        self._requests = requests
        self._most = most
        self._next = 0
        self._members: dict[int, _Member] = {}
        self._outcomes: dict[int, Answer | Exception] = dict(refused)
        self._arrivals: queue.SimpleQueue[tuple[int, Output | Question | Exception]]
        self._arrivals = queue.SimpleQueue()
        self._left = False  # by an interrupt, say

    def run(self) -> list[Answer | Exception]:
        """What became of each request, in order. However it is left, nothing stays in work."""
        openers = max(1, min(self._most, _MAX_OPENERS, len(self._requests)))
        pool = ThreadPoolExecutor(openers, thread_name_prefix="ask_batch")
        try:
            while len(self._outcomes) < len(self._requests):
                self._begin(pool)
                self._take(*self._arrival())
        finally:
            self._left = True
            pool.shutdown(wait=False, cancel_futures=True)
            for index in list(self._members):
                self._end(index)
        # Not kept here: an error's traceback may hold this object.
        return [self._outcomes.pop(index) for index in range(len(self._requests))]

    def _begin(self, pool: ThreadPoolExecutor) -> None:
        """Have the next videos opened."""
        while self._next < len(self._requests) and len(self._members) < self._most:
            index, self._next = self._next, self._next + 1
            if index in self._outcomes:
                continue
            request = dict(self._requests[index])
            member = self._members[index] = _Member(request.pop("on_event", None))
            try:
                pool.submit(self._open, index, member.stack, request)
            except RuntimeError:  # the main thread has ended: executors take no more
                self._open(index, member.stack, request)

    def _open(self, index: int, stack: ExitStack, request: dict[str, Any]) -> None:
        if self._left:
            return
        try:
            self._arrivals.put((index, self._open_question(stack, **request)))
        except Exception as error:
            self._arrivals.put((index, error))
        if self._left:
            stack.close()

    def _arrival(self) -> tuple[int, Output | Question | Exception]:
        """What comes next: a question that is open, an output of one, or its failure."""
        waits = [
            (left, index, member.question)
            for index, member in self._members.items()
            if member.question is not None
            and member.ticket is not None
            and (left := member.question.seconds_left(member.ticket)) is not None
        ]
        if not waits:
            return self._arrivals.get()
        seconds, first, question = min(waits)
        try:
            return self._arrivals.get(timeout=seconds)
        except queue.Empty:
            return first, question.timed_out()

    def _take(self, index: int, arrival: Output | Question | Exception) -> None:
        member = self._members.get(index)
        if member is None:
            return
        try:
            if isinstance(arrival, Question):
                member.question = arrival
                member.ticket = self._driver.submit(arrival.request, partial(self._deliver, index))
            elif isinstance(arrival, Exception):
                self._end(index, arrival)
            elif isinstance(arrival, RequestFailed):
                self._end(index, arrival.error)
            elif member.question is not None:
                for event in member.question.events(arrival):
                    if isinstance(event, AnswerReady):
                        self._end(index, event.answer)
                    elif member.on_event is not None:
                        member.on_event(event)
        except Exception as error:
            self._end(index, error)

    def _deliver(self, index: int, output: Output) -> None:
        self._arrivals.put((index, output))

    def _end(self, index: int, outcome: Answer | Exception | None = None) -> None:
        if outcome is not None:
            self._outcomes[index] = outcome
        member = self._members.pop(index)
        if member.ticket is not None:
            self._driver.abort(member.ticket)
        member.stack.close()
