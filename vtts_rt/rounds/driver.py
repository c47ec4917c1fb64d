"""Driver: one thread that steps the engine for all requests.

Requests may come from any thread; each gets its outputs through a callback, in order. Whatever
touches the engine runs on this thread, between two forward passes. Submitting and aborting never
wait for it: they may happen anywhere, in a coroutine or in the middle of a garbage collection.
"""

from __future__ import annotations

import copy
import logging
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TypeVar
from weakref import WeakSet

import torch

from vtts_rt import process
from vtts_rt.engine.sequence import GenerationRequest
from vtts_rt.errors import Aborted, Overloaded
from vtts_rt.rounds.prepare import RoundRequest
from vtts_rt.rounds.results import AnswerReady
from vtts_rt.rounds.scheduler import Output, RequestFailed, RoundScheduler

logger = logging.getLogger(__name__)

_CLOSED = "Runtime: it is closed; make a new one"

T = TypeVar("T")
Deliver = Callable[[Output], None]


def set_threads(num_threads: int | None = None) -> None:
    """Threads of torch on the calling thread, None or 0: as they are. One in a forked child: the
    threads of GNU's OpenMP are the parent's, and the child's first would wait for them for ever.
    """
    if process.is_forked():
        torch.set_num_threads(1)
    elif num_threads:
        torch.set_num_threads(num_threads)


class Ticket:
    """A place for one request, of the `max_requests` that a driver takes; ids are the scheduler's.

    A context manager: leaving it gives the place back and ends the request, if it still runs.
    """

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self.request_id: int | None = None
        self.aborted = False

    def __enter__(self) -> Ticket:
        return self

    def __exit__(self, *error: object) -> None:
        self._driver.abort(self)


# What is handed over: a place, the request and what takes its outputs.
Submission = tuple[Ticket, "RoundRequest | Sequence[GenerationRequest]", Deliver]


class Driver:
    """Runs a RoundScheduler. Thread-safe; the thread starts with the first request.

    finish: called once, when the driver has been closed and nothing runs any more. threads: for
    torch on the driver's thread; None: as many as where the first request comes from.
    max_requests: in work, waiting and being opened, see `admit`.
    Before the interpreter is finalised the thread ends after its forward pass; what is pending
    then gets no further output, unless `close` is called after that.
    """

    def __init__(
        self,
        scheduler: RoundScheduler,
        *,
        finish: Callable[[], None] = lambda: None,
        threads: int | None = None,
        max_requests: int = 1 << 30,
    ) -> None:
        self._scheduler = scheduler
        self._finish = finish
        self._threads = threads
        self._process = os.getpid()
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._aborts: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._deliver: dict[int, tuple[Ticket, Deliver]] = {}
        self._max_requests = max_requests
        # Weak: a coroutine whose event loop was closed is dropped without an end.
        self._admitted: WeakSet[Ticket] = WeakSet()
        self._ends: deque[float] = deque([time.monotonic()], maxlen=33)  # of the latest requests
        self._thread: threading.Thread | None = None
        self._lock = threading.RLock()  # a garbage collection may close what it collects
        self._closed = self._suspended = self._finished = False
        process.at_exit(self, Driver._suspend)

    def check_process(self) -> None:
        """RuntimeError in a forked child, which has the driver but not its thread."""
        if os.getpid() != self._process:
            raise RuntimeError(
                "Runtime: it belongs to the process that made it, which this one was forked from; "
                "make a Runtime of its own here"
            )

    def admit(self) -> Ticket:
        """A place for a request, taken before its videos are opened. Overloaded where there is
        none, with the mean time between the ends of the latest requests as retry_after_seconds."""
        self.check_process()
        with self._lock:
            if len(self._admitted) < self._max_requests:
                ticket = Ticket(self)
                self._admitted.add(ticket)
                return ticket
            seconds = (time.monotonic() - self._ends[0]) / len(self._ends)
        raise Overloaded(
            f"Runtime: {self._max_requests} requests are in work or wait, the most that "
            f"RuntimeConfig.max_queued_requests and EngineConfig.max_sequences allow",
            min(max(seconds, 0.1), 60.0),
        )

    def submit(
        self,
        ticket: Ticket,
        request: RoundRequest | Sequence[GenerationRequest],
        deliver: Deliver,
    ) -> None:
        """Hand a request over; returns at once. `deliver` is called on the driver's thread with
        each output; the last one is AnswerReady, Completions or RequestFailed. RuntimeError if
        the driver is closed, and in a forked child."""
        self.submit_together([(ticket, request, deliver)])

    def submit_together(self, submitted: Sequence[Submission]) -> None:
        """As `submit`, several at once: no update of the weights comes between them."""

        def add() -> None:
            for one in submitted:
                self._add(*one)

        self._queue(add)

    def _add(
        self,
        ticket: Ticket,
        request: RoundRequest | Sequence[GenerationRequest],
        deliver: Deliver,
    ) -> None:
        if ticket.aborted:
            return
        try:
            self._check_open()
            ticket.request_id = request_id = self._scheduler.add(request)
        except Exception as error:
            _delivers(deliver, RequestFailed(error))
        else:
            self._deliver[request_id] = ticket, deliver
            if ticket.aborted:  # meanwhile, perhaps before it had an id
                self._forget(request_id)

    def abort(self, ticket: Ticket) -> None:
        """End a request, if it still runs, before the next forward pass; returns at once. After
        that nothing is delivered to it."""
        ticket.aborted = True
        self._admitted.discard(ticket)
        if ticket.request_id is not None:
            self._aborts.put(ticket.request_id)

    def call(self, function: Callable[[], T]) -> T:
        """The result of `function`, run on the driver's thread between two forward passes."""
        future: Future[T] = Future()

        def run() -> None:
            nonlocal future
            try:
                self._check_open()
                future.set_result(function())
            except _Suspended:
                raise
            except BaseException as error:
                future.set_exception(error)
                del future  # the error's traceback holds this frame, and the future the error

        self._queue(run)
        return future.result()

    def call_idle(self, function: Callable[[], T], abort: str = "") -> T:
        """As `call`, once what is in work has been finished, or ended as aborted for what `abort`
        says."""

        def run() -> T:
            if abort:
                self._fail_all(Aborted(f"Runtime: aborted for {abort}"))
            self._serve_aborts()
            while self._scheduler.has_work:
                self._check_open()
                self._step()
            return function()

        return self.call(run)

    def close(self) -> bool:
        """Fail what is pending and wait for the thread to end; may be called again, anywhere.

        False where it does not wait: on that thread, which then ends after what it is at, and in a
        forked child, where nothing happens."""
        if os.getpid() != self._process:
            return False
        self.begin_closing()
        with self._lock:
            thread = self._thread
        if thread is threading.current_thread():
            return False
        if thread is not None:
            thread.join()
        with self._lock:
            self._end()
        return True

    def begin_closing(self) -> None:
        """`close` without waiting."""
        self._closed = True
        self._calls.put(lambda: None)

    def _suspend(self) -> None:
        with self._lock:
            self._suspended, thread = True, self._thread
        self._calls.put(lambda: None)
        if thread is not None:
            thread.join()

    def _queue(self, run: Callable[[], None]) -> None:
        self.check_process()
        with self._lock:
            if not (self._closed or self._suspended):
                if self._thread is None:
                    self._thread = threading.Thread(
                        target=self._work,
                        args=(self._threads or torch.get_num_threads(),),
                        name="vtts_rt driver",
                        daemon=True,
                    )
                    self._thread.start()
                self._calls.put(run)
                return
        process.wait_for_end()
        raise RuntimeError(_CLOSED)

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError(_CLOSED)
        if self._suspended:
            raise _Suspended

    def _work(self, threads: int) -> None:
        torch.set_num_threads(threads)  # OpenMP and MKL keep the number for each thread
        try:
            while not (self._closed or self._suspended):
                idle = not self._scheduler.has_work
                while idle or not self._calls.empty():
                    call = self._calls.get()
                    self._serve_aborts()
                    try:
                        call()
                    except _Suspended:
                        self._calls.put(call)  # for `close`
                        return
                    del call
                    idle = False
                if self._scheduler.has_work and not self._suspended:
                    self._step()
        finally:
            if not self._suspended:
                with self._lock:
                    self._closed = True
                    self._end()

    def _end(self) -> None:
        """Fail all that is pending, and finish."""
        while not self._calls.empty():
            self._calls.get()()
        self._fail_all(Aborted("Runtime: it was closed before the request ended"))
        if not self._finished:
            self._finished = True
            self._finish()

    def _step(self) -> None:
        self._serve_aborts()
        try:
            outputs = self._scheduler.step()
        except Exception as error:  # no request's own fault
            self._fail_all(error)
            return
        for request_id, output in outputs:
            self._hand_over(request_id, output)

    def _serve_aborts(self) -> None:
        while not self._aborts.empty():
            self._forget(self._aborts.get())

    def _hand_over(self, request_id: int, output: Output) -> None:
        if request_id not in self._deliver:
            return
        ticket, deliver = self._deliver[request_id]
        if not _delivers(deliver, output):
            self._forget(request_id)
        elif isinstance(output, AnswerReady | list | RequestFailed):
            del self._deliver[request_id]
        else:
            return
        self._admitted.discard(ticket)
        self._ends.append(time.monotonic())

    def _forget(self, request_id: int) -> None:
        self._deliver.pop(request_id, None)
        try:
            self._scheduler.abort(request_id)
        except Exception:  # the others go on, or are failed, all the same
            logger.exception("request %d could not be ended", request_id)

    def _fail_all(self, error: Exception) -> None:
        for request_id in list(self._deliver):
            self._hand_over(request_id, RequestFailed(_copy_of(error)))
            self._forget(request_id)


def _copy_of(error: Exception) -> Exception:
    """For one request of several that fail: raising changes an error's traceback and context."""
    try:
        copied: Exception = copy.copy(error)
    except Exception:  # a class that is not made of its args
        return RuntimeError(f"{type(error).__name__}: {error}")
    return copied.with_traceback(error.__traceback__)


class _Suspended(BaseException):
    """The interpreter is ending: no more is done for requests, which only daemon threads have."""


def _delivers(deliver: Deliver, output: Output) -> bool:
    """Hand an output over; False where nobody can take it any more (a closed event loop)."""
    try:
        deliver(output)
    except Exception:
        return False
    return True
