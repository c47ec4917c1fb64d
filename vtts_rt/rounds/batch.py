"""Batch: many questions of one caller at once, awaited on the caller's thread."""

from __future__ import annotations

import queue
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

from vtts_rt.rounds.ask import Ask, Listener
from vtts_rt.rounds.driver import Driver, Ticket
from vtts_rt.rounds.prepare import Resources, RoundRequest, open_request
from vtts_rt.rounds.results import Answer, AnswerReady
from vtts_rt.rounds.scheduler import Output
from vtts_rt.rounds.streams import seconds_left, timed_out, told

_MAX_OPENERS = 8  # threads that open videos; each of a long one reads and hashes with several


class _Member:
    """A request in work. ticket: None until it is admitted; request: until its videos are open."""

    def __init__(self, on_event: Listener | None) -> None:
        self.on_event = on_event
        self.stack = ExitStack()
        self.request: RoundRequest | None = None
        self.ticket: Ticket | None = None


class Batch:
    """Requests to one driver, at most `EngineConfig.max_sequences` of them open at a time.

    called: `time.monotonic()` of the call. requests: each an Ask and what sees its events, or why
    it cannot be asked.
    """

    def __init__(
        self,
        driver: Driver,
        resources: Resources,
        called: float,
        requests: Sequence[tuple[Ask, Listener | None] | Exception],
    ) -> None:
        self._driver = driver
        self._resources, self._called = resources, called
        self._requests = requests
        self._most = resources.engine.config.max_sequences
        self._next = 0
        self._members: dict[int, _Member] = {}
        self._outcomes: dict[int, Answer | Exception] = {
            index: refused
            for index, refused in enumerate(requests)
            if isinstance(refused, Exception)
        }
        self._arrivals: queue.SimpleQueue[tuple[int, Output | RoundRequest | Exception]]
        self._arrivals = queue.SimpleQueue()
        self._left = False  # by an interrupt, say

    def run(self, return_exceptions: bool) -> list[Answer | Exception]:
        """What became of each request, in order; the first error is raised unless they are to be
        returned. However it is left, nothing stays in work."""
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
        # Not kept here: an error's traceback may hold this object and this frame.
        outcomes = [self._outcomes.pop(index) for index in range(len(self._requests))]
        errors = [outcome for outcome in outcomes if isinstance(outcome, Exception)]
        try:
            if errors and not return_exceptions:
                raise errors[0]
            return outcomes
        finally:
            del outcomes, errors

    def _begin(self, pool: ThreadPoolExecutor) -> None:
        """Have the next videos opened."""
        while self._next < len(self._requests) and len(self._members) < self._most:
            index, self._next = self._next, self._next + 1
            request = self._requests[index]
            if isinstance(request, Exception):
                continue
            ask, on_event = request
            member = self._members[index] = _Member(on_event)
            try:
                pool.submit(self._open, index, member, ask)
            except RuntimeError:  # the main thread has ended: executors take no more
                self._open(index, member, ask)

    def _open(self, index: int, member: _Member, ask: Ask) -> None:
        if self._left:
            return
        try:
            member.ticket = self._driver.admit()
            request = open_request(self._resources, self._called, ask, member.stack)
            self._arrivals.put((index, request))
        except Exception as error:
            self._arrivals.put((index, error))
        if self._left:
            self._close(member)

    def _arrival(self) -> tuple[int, Output | RoundRequest | Exception]:
        """What comes next: a request that is open, an output of one, or its failure."""
        waits = [
            (left, index, member.request)
            for index, member in self._members.items()
            if member.request is not None
            and member.ticket is not None
            and (left := seconds_left(member.request.deadline_seconds, member.ticket)) is not None
        ]
        if not waits:
            return self._arrivals.get()
        seconds, first, request = min(waits)
        try:
            return self._arrivals.get(timeout=seconds)
        except queue.Empty:
            return first, timed_out(request)

    def _take(self, index: int, arrival: Output | RoundRequest | Exception) -> None:
        member = self._members.get(index)
        if member is None:
            return
        try:
            if isinstance(arrival, RoundRequest):
                assert member.ticket is not None
                member.request = arrival
                self._driver.submit(
                    member.ticket, arrival, lambda output: self._arrivals.put((index, output))
                )
            elif isinstance(arrival, Exception):
                self._end(index, arrival)
            else:
                event = told(arrival)
                if isinstance(event, AnswerReady):
                    self._end(index, event.answer)
                elif member.on_event is not None:
                    member.on_event(event)
        except Exception as error:
            self._end(index, error)

    def _end(self, index: int, outcome: Answer | Exception | None = None) -> None:
        if outcome is not None:
            self._outcomes[index] = outcome
        self._close(self._members.pop(index))

    def _close(self, member: _Member) -> None:
        if member.ticket is not None:
            self._driver.abort(member.ticket)
        member.stack.close()
