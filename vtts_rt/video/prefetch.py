"""PrefetchQueue: frames that will be wanted, decoded ahead by a few threads.

Two kinds wait: frames that a prompt needs, which are never dropped, and guesses, which are.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

from vtts_rt import process
from vtts_rt.video.source import FrameSource

logger = logging.getLogger(__name__)

# Frames a thread takes at a time, so that a blocking read never waits for more than these.
PREFETCH_BATCH = 8
# Each decodes another video, so one question has one. On 2 cores, which others kept busy too, a
# second one made six questions about six videos 12 % faster with `tiny` (median of 24), four about
# four 5 % with the 118 M bench model (of 5), in no more processor time.
PREFETCH_WORKERS = min(4, os.cpu_count() or 1)

# Called with frames delivered, before they can be found, and after a batch with how many the codec
# decoded.
Observer = Callable[[Sequence[int], int], None]

_KINDS = ("guessed", "guessed_used", "guessed_late", "cancelled", "dropped")
COUNTERS = tuple(f"frames_{kind}" for kind in _KINDS)


class Wanted:
    """What one request wants of one video and does not have yet.

    source: the request's own; observer: told what was decoded for it; passing: by-products worth
    keeping. The rest belongs to the queue. needed, guessed: frames that wait, in order;
    decoding: those that a thread is at. unproven: frames guessed, neither taken out of the queue
    nor asked for so far.
    """

    def __init__(self, source: FrameSource, observer: Observer) -> None:
        meta = source.metadata
        self.source = source
        self.observer = observer
        self.passing: Collection[int] = ()
        self.video = (meta.video_id, meta.decoder)
        self.frame_bytes = meta.height * meta.width * 3
        self.needed: dict[int, None] = {}
        self.guessed: dict[int, None] = {}
        self.decoding: Sequence[int] = ()
        self.unproven: set[int] = set()
        self.since = 0  # number of the last `need` or `guess`
        self.frames_guessed = 0
        self.frames_guessed_used = 0


class PrefetchQueue:
    """Frames of many requests, by request: what one gives up another may still want.

    decode(wanted, indices): decodes those of the frames that are not there, and says what it
        delivered through `arrived`. Its errors are logged and end these frames' stay here: the
        request that asks for them decodes them again and gets the error.
    most_guessed_bytes: of pixels that may wait as guesses; beyond that the oldest guesses are
        dropped, of one guess the last frames. Needed frames have no bound but that of the
        requests in work.
    num_workers: most threads, 0 for none (`serve` is then called by hand). They start as videos
        come; while nothing waits they hold nothing, so a store that is dropped ends them.
    Needed frames go first, the oldest first; then guesses, the newest first. One thread at a time
    decodes for one video: two would decode the same stream twice.
    Counters: frames_guessed: frames fetched ahead on a guess. frames_guessed_used: those that
    their request then asked for; frames_guessed_late: of these, still waiting or being decoded at
    that time. frames_cancelled: frames, needed or guessed, taken out before
    their decoding began because their request ended or guessed anew. frames_dropped: guesses that
    gave way to newer ones.
    Thread-safe; `decode` is called without the lock.
    """

    def __init__(
        self,
        decode: Callable[[Wanted, list[int]], None],
        most_guessed_bytes: int,
        num_workers: int = PREFETCH_WORKERS,
    ) -> None:
        self.frames_guessed = self.frames_guessed_used = self.frames_guessed_late = 0
        self.frames_cancelled = self.frames_dropped = 0
        self._decode = decode
        self._most_guessed_bytes = most_guessed_bytes
        self._num_workers = num_workers
        self._waiting: dict[Wanted, None] = {}
        self._busy: dict[tuple[str, str], Wanted] = {}
        self._since = 0
        self._pool = ThreadPoolExecutor(max(1, num_workers), thread_name_prefix="prefetch")
        self._working = 0  # threads that are at it
        self._threads: set[int] = set()  # all there are, by their numbers
        self._closed = False
        self._lock = threading.RLock()  # a garbage collection may close what it collects
        process.before_exit(self, PrefetchQueue._give_up)

    def need(self, wanted: Wanted, indices: Sequence[int]) -> None:
        """Frames that a prompt needs, in order; those that were guessed wait as guesses no more."""
        with self._lock:
            for index in indices:
                wanted.guessed.pop(index, None)
                if index not in wanted.decoding:
                    wanted.needed[index] = None
            self._enqueue(wanted)

    def guess(
        self, wanted: Wanted, indices: Sequence[int], absent: Sequence[int] | None = None
    ) -> None:
        """Frames that the request is likely to want; absent: those to fetch, in order (None: all).

        Its earlier guesses that are not among `indices`, and wait, are cancelled. One that is, and
        is absent no more, has just come: `arrived` will say so.
        """
        with self._lock:
            self._cancel(wanted, wanted.guessed.keys() - set(indices))
            for index in indices if absent is None else absent:
                there = index in wanted.guessed or index in wanted.needed
                if self._closed or there or index in wanted.decoding:
                    continue
                if index not in wanted.unproven:  # else decoded, not asked for and evicted
                    wanted.unproven.add(index)
                    wanted.frames_guessed += 1
                    self.frames_guessed += 1
                wanted.guessed[index] = None
            self._enqueue(wanted)
            self._drop_excess()

    def asked(self, wanted: Wanted, indices: Collection[int]) -> None:
        """The request asks for frames: those that were guessed were guessed right."""
        with self._lock:
            used = wanted.unproven.intersection(indices)
            late = [i for i in used if i in wanted.guessed or i in wanted.decoding]
            wanted.unproven -= used
            wanted.frames_guessed_used += len(used)
            self.frames_guessed_used += len(used)
            self.frames_guessed_late += len(late)
            for index in used:  # the request itself decodes it, or reports the error
                wanted.guessed.pop(index, None)
            self._leave_if_done(wanted)

    def cancel(self, wanted: Wanted, keep: Collection[int] = ()) -> None:
        """Takes out what waits, but for `keep`."""
        with self._lock:
            self._cancel(wanted, {*wanted.needed, *wanted.guessed} - set(keep))

    def arrived(self, video: tuple[str, str], indices: Collection[int]) -> None:
        """Frames that are there now: no request waits for them any more."""
        with self._lock:
            if video in self._busy:
                busy = self._busy[video]
                busy.decoding = [i for i in busy.decoding if i not in indices]
            for wanted in [w for w in self._waiting if w.video == video]:
                for index in indices:
                    wanted.needed.pop(index, None)
                    wanted.guessed.pop(index, None)
                self._leave_if_done(wanted)

    def on_their_way(self, wanted: Wanted, indices: Collection[int]) -> bool:
        """Whether any of the frames waits or is being decoded for this request."""
        with self._lock:
            return any(
                index in wanted.needed or index in wanted.guessed or index in wanted.decoding
                for index in indices
            )

    def take_counts(self, all_wanted: Iterable[Wanted]) -> tuple[int, int]:
        """Frames guessed and guessed frames used since the last take, and a fresh start."""
        guessed = used = 0
        with self._lock:
            for wanted in all_wanted:
                guessed += wanted.frames_guessed
                used += wanted.frames_guessed_used
                wanted.frames_guessed = wanted.frames_guessed_used = 0
        return guessed, used

    def close(self) -> None:
        """Cancels all that waits and ends the threads; waits for them if it is none of them."""
        self._give_up()
        self._pool.shutdown(wait=threading.get_ident() not in self._threads)

    def _give_up(self) -> None:
        """Fetch nothing ahead any more: what is asked for is decoded where it is."""
        with self._lock:
            self._closed = True
            for wanted in list(self._waiting):
                self._cancel(wanted, {*wanted.needed, *wanted.guessed})

    def stats(self) -> dict[str, int]:
        with self._lock:
            return {name: getattr(self, name) for name in COUNTERS}

    def serve(self, own_thread: bool = False) -> bool:
        """Decode the next batch; False if none waits but of videos that are being decoded.

        own_thread: the caller is a thread of the queue, which ends then.
        """
        with self._lock:
            wanted = self._next()
            if wanted is None:  # the thread that reads the video takes the rest of it
                self._working -= own_thread
                return False
            batch = list(wanted.needed or wanted.guessed)[:PREFETCH_BATCH]
            for index in batch:
                wanted.needed.pop(index, None)
                wanted.guessed.pop(index, None)
            wanted.decoding = batch
            self._leave_if_done(wanted)
            self._busy[wanted.video] = wanted
        try:
            self._decode(wanted, batch)
        except Exception as error:
            logger.debug("prefetch of frames %s failed: %s", batch, error)
        finally:
            with self._lock:
                wanted.decoding = ()
                del self._busy[wanted.video]
        return True

    def check_integrity(self) -> None:
        """AssertionError when the books do not balance."""
        with self._lock:
            waiting = list(self._waiting)
            assert all(w.needed or w.guessed for w in waiting), "nothing waits"
            assert not any(w.needed.keys() & w.guessed.keys() for w in waiting), "both kinds"
            assert all(w.guessed.keys() <= w.unproven for w in waiting), "guessed, asked for"
            assert self._guessed_bytes() <= self._most_guessed_bytes, "bytes of guesses"
            settled = self.frames_guessed_used + self.frames_dropped
            assert self.frames_guessed_late <= self.frames_guessed_used, "late"
            assert settled <= self.frames_guessed, "guesses"

    # -- internals, under the lock ----------------------------------------------------------

    def _next(self) -> Wanted | None:
        free = [w for w in self._waiting if w.video not in self._busy]
        needed = [w for w in free if w.needed]
        if needed:
            return min(needed, key=lambda w: w.since)
        return max(free, key=lambda w: w.since, default=None)

    def _enqueue(self, wanted: Wanted) -> None:
        if self._closed:
            wanted.needed.clear()
        if not (wanted.needed or wanted.guessed):
            return
        self._since += 1
        wanted.since = self._since
        self._waiting[wanted] = None
        videos = self._busy.keys() | {w.video for w in self._waiting}
        if self._working < min(self._num_workers, len(videos)):
            self._pool.submit(self._work)
            self._working += 1

    def _cancel(self, wanted: Wanted, indices: Collection[int]) -> None:
        for index in indices:
            if index in wanted.guessed:
                del wanted.guessed[index]
                wanted.unproven.discard(index)
            else:
                del wanted.needed[index]
        self.frames_cancelled += len(indices)
        self._leave_if_done(wanted)

    def _drop_excess(self) -> None:
        while self._guessed_bytes() > self._most_guessed_bytes:
            oldest = min((w for w in self._waiting if w.guessed), key=lambda w: w.since)
            index, _ = oldest.guessed.popitem()
            oldest.unproven.discard(index)
            self.frames_dropped += 1
            self._leave_if_done(oldest)

    def _guessed_bytes(self) -> int:
        return sum(len(w.guessed) * w.frame_bytes for w in self._waiting)

    def _leave_if_done(self, wanted: Wanted) -> None:
        if not (wanted.needed or wanted.guessed):
            self._waiting.pop(wanted, None)

    # -- internals, without it --------------------------------------------------------------

    def _work(self) -> None:
        self._threads.add(threading.get_ident())
        while self.serve(own_thread=True):
            pass
