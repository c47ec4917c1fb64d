"""PrefetchQueue: what goes first, what gives way, what is counted."""

from __future__ import annotations

import threading

from prefetch_tools import NUM_FRAMES, PATIENCE_SECONDS, Log

from vtts_rt.video.prefetch import PREFETCH_BATCH, PrefetchQueue, Wanted

# -- order and bounds -------------------------------------------------------------------------


def test_needed_frames_go_first_and_in_turn_then_the_newest_guess() -> None:
    log = Log()
    a, b, c, d = (log.wanted(i) for i in range(4))
    log.queue.guess(c, [1, 2])
    log.queue.guess(d, [3])
    log.queue.need(a, [9, *range(8)])
    log.queue.need(b, [5])
    assert log.serve_all() == [
        (0, [9, *range(PREFETCH_BATCH - 1)]),
        (0, [7]),
        (1, [5]),
        (3, [3]),
        (2, [1, 2]),
    ]


def test_the_oldest_guesses_give_way_and_needed_frames_never() -> None:
    log = Log(most_guessed=5)
    a, b, c = (log.wanted(i) for i in range(3))
    log.queue.need(a, range(NUM_FRAMES))  # whatever the bound
    log.queue.guess(b, [1, 2, 3])
    log.queue.guess(c, [4, 5, 6])
    assert log.queue.frames_dropped == 1
    assert not log.queue.on_their_way(b, [3]) and log.queue.on_their_way(b, [2])
    log.queue.guess(a, [])
    log.queue.guess(c, range(4, 12))  # more than there is room for: the first ones stay
    assert log.queue.frames_dropped == 1 + 2 + 3
    log.queue.check_integrity()
    batches = log.serve_all()
    assert [i for name, batch in batches if name == 0 for i in batch] == [*range(NUM_FRAMES)]
    assert batches[3:] == [(2, [4, 5, 6, 7, 8])]
    assert log.queue.frames_guessed == 11 and log.queue.frames_cancelled == 0


def test_a_new_guess_takes_the_place_of_the_last() -> None:
    log = Log()
    a = log.wanted(0)
    log.queue.guess(a, [1, 2, 3])
    log.queue.guess(a, [2, 3, 4, 5])
    assert (log.queue.frames_guessed, log.queue.frames_cancelled) == (5, 1)
    log.queue.cancel(a, keep=[3, 4])
    assert log.queue.frames_cancelled == 3
    assert log.serve_all() == [(0, [3, 4])]
    # What was decoded and has been forgotten since is fetched again and counted once.
    log.queue.guess(a, [3])
    assert log.serve_all() == [(0, [3])] and log.queue.frames_guessed == 5


def test_a_guess_that_is_needed_stops_being_one() -> None:
    log = Log(most_guessed=2)
    a, b = log.wanted(0), log.wanted(1)
    log.queue.guess(a, [1, 2])
    log.queue.asked(a, [2, 9])
    log.queue.need(a, [2, 9])
    log.queue.guess(b, [5, 6])  # takes the room of frame 1, cannot take that of frame 2
    counts = log.queue.stats()
    assert (counts["frames_guessed_used"], counts["frames_guessed_late"]) == (1, 1)
    assert counts["frames_dropped"] == 1
    assert log.serve_all() == [(0, [2, 9]), (1, [5, 6])]
    log.queue.asked(b, [5])
    log.queue.asked(b, [5])
    assert log.queue.take_counts([a, b]) == (4, 2)
    assert log.queue.take_counts([a, b]) == (0, 0)
    assert log.queue.frames_guessed_late == 1  # 5 was there


def test_a_closed_queue_takes_nothing_and_has_nothing() -> None:
    log = Log()
    a = log.wanted(0)
    log.queue.need(a, [1])
    log.queue.guess(a, [2])
    log.queue.close()
    log.queue.close()
    log.queue.need(a, [3])
    log.queue.guess(a, [4])
    assert not log.queue.on_their_way(a, range(NUM_FRAMES)) and not log.queue.serve()
    assert (log.queue.frames_cancelled, log.queue.frames_guessed) == (2, 1)
    log.queue.check_integrity()


# -- threads ----------------------------------------------------------------------------------


def test_videos_are_decoded_side_by_side_and_one_video_by_one_thread() -> None:
    both = threading.Barrier(2)
    inside: dict[tuple[str, str], int] = {}
    crowded: list[Wanted] = []

    def decode(wanted: Wanted, indices: list[int]) -> None:
        inside[wanted.video] = inside.get(wanted.video, 0) + 1
        crowded.extend([wanted] * (inside[wanted.video] > 1))
        if 0 in indices:
            both.wait(PATIENCE_SECONDS)  # passed only by two at a time
        inside[wanted.video] -= 1
        queue.arrived(wanted.video, indices)

    queue = PrefetchQueue(decode, 10**6, num_workers=2)
    log = Log()
    first, second, other = log.wanted(0), log.wanted(1, video=0), log.wanted(2)
    queue.need(first, range(NUM_FRAMES))
    queue.need(second, range(1, NUM_FRAMES))
    queue.need(other, range(NUM_FRAMES))
    everything = range(NUM_FRAMES)
    done = threading.Event()
    while any(queue.on_their_way(w, everything) for w in (first, second, other)):
        assert not done.wait(0.001)
    queue.close()
    assert crowded == []


def test_an_error_costs_its_own_batch_alone() -> None:
    calls: list[list[int]] = []

    def decode(wanted: Wanted, indices: list[int]) -> None:
        calls.append(indices)
        raise OSError("disk gone")

    queue = PrefetchQueue(decode, 10**6, num_workers=0)
    wanted = Log().wanted(0)
    queue.need(wanted, range(10))
    assert queue.serve() and not queue.on_their_way(wanted, range(8))
    assert queue.serve() and not queue.serve() and calls == [[*range(8)], [8, 9]]
    queue.check_integrity()
