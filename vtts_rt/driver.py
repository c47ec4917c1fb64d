"""Driver: one thread that steps the engine for everybody who asks.

Requests may come from any thread; each gets its outputs through a callback, in order. Whatever
touches the engine runs on this thread, between two forward passes. Asking and ending never wait for
it: they may happen anywhere, in a coroutine or in the middle of a garbage collection.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

import torch

from vtts_rt.engine.sequence import Completion, GenerationRequest
from vtts_rt.results import RoundsEnded
from vtts_rt.rounds import Output, RequestFailed, RoundRequest, RoundScheduler

logger = logging.getLogger(__name__)

T = TypeVar("T")
Deliver = Callable[[Output], None]


class Ticket:
    """One request handed to a driver; ids are the scheduler's."""

    def __init__(self) -> None:
        self.request_id: int | None = None
        self.aborted = False


class Driver:
    """Runs a RoundScheduler. Thread-safe; the thread starts with the first request."""

    def __init__(self, scheduler: RoundScheduler) -> None:
        self._scheduler = scheduler
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._aborts: queue.SimpleQueue[Ticket] = queue.SimpleQueue()
        self._deliver: dict[int, Deliver] = {}
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._closed = False

    def submit(self, request: RoundRequest | GenerationRequest, deliver: Deliver) -> Ticket:
        """Hand a request over; returns at once. `deliver` is called on the driver's thread with
        each output; the last one is RoundsEnded, a Completion or RequestFailed. RuntimeError if
        the driver is closed."""
        ticket = Ticket()

        def add() -> None:
            if ticket.aborted:
                return
            try:
                self._refuse_if_closed()
                ticket.request_id = self._scheduler.add(request)
            except Exception as error:
                deliver(RequestFailed(error))
            else:
                self._deliver[ticket.request_id] = deliver

        self._queue(add)
        return ticket

    def abort(self, ticket: Ticket) -> None:
        """End a request, if it still runs, before the next forward pass; returns at once. After
        that nothing is delivered to it."""
        ticket.aborted = True
        self._aborts.put(ticket)

    def call(self, function: Callable[[], T]) -> T:
        """The result of `function`, run on the driver's thread between two forward passes."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                self._refuse_if_closed()
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        self._queue(run)
        return future.result()

    def drain(self, *, abort: bool = False) -> None:
        """On the driver's thread: finish what is in work, or end it with an error."""
        if abort:
            self._fail_all(RuntimeError("Runtime: aborted for an update of the weights"))
        self._serve_aborts()
        while self._scheduler.has_work:
            self._refuse_if_closed()
            self._step()

    def close(self) -> None:
        """Fail what is in work and end the thread."""
        with self._lock:
            self._closed = True
            thread = self._thread
        if thread is not None:
            self._calls.put(lambda: None)
            thread.join()

    def _queue(self, run: Callable[[], None]) -> None:
        with self._lock:
            self._refuse_if_closed()
            if self._thread is None:
                threads = torch.get_num_threads()
                self._thread = threading.Thread(
                    target=self._work, args=(threads,), name="vtts_rt driver", daemon=True
                )
                self._thread.start()
            self._calls.put(run)

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise RuntimeError("Runtime: it is closed; make a new one")

    def _work(self, threads: int) -> None:
        torch.set_num_threads(threads)  # OpenMP and MKL keep the number for each thread
        try:
            while not self._closed:
                idle = not self._scheduler.has_work
                while idle or not self._calls.empty():
                    call = self._calls.get()
                    self._serve_aborts()
                    call()
                    idle = False
                if self._scheduler.has_work:
                    self._step()
        finally:  # whoever still waits hears that nothing more will come
            with self._lock:
                self._closed = True
            while not self._calls.empty():
                self._calls.get()()
            self._fail_all(RuntimeError("Runtime: it was closed before the request ended"))

    def _step(self) -> None:
        self._serve_aborts()
        try:
            outputs = self._scheduler.step()
        except Exception as error:  # no request's own fault: everybody hears of it
            self._fail_all(error)
            return
        for request_id, output in outputs:
            self._hand_over(request_id, output)

    def _serve_aborts(self) -> None:
        while not self._aborts.empty():
            request_id = self._aborts.get().request_id
            if request_id is not None:
                self._forget(request_id)

    def _hand_over(self, request_id: int, output: Output) -> None:
        deliver = self._deliver.get(request_id)
        if deliver is None:
            return
        try:
            deliver(output)
        except Exception:  # nobody listens any more (an event loop that was closed)
            self._forget(request_id)
            return
        if isinstance(output, RoundsEnded | Completion | RequestFailed):
            del self._deliver[request_id]

    def _forget(self, request_id: int) -> None:
        self._deliver.pop(request_id, None)
        try:
            self._scheduler.abort(request_id)
        except Exception:  # the others go on, or hear of their own end, all the same
            logger.exception("request %d could not be ended", request_id)

    def _fail_all(self, error: Exception) -> None:
        for request_id in list(self._deliver):
            self._hand_over(request_id, RequestFailed(error))
            self._forget(request_id)
