"""Stamps of packets that are damaged here and there, or start over in joined streams.

Shape letters: N packets of a stream in file (decode) order.
"""

from __future__ import annotations

import numpy as np

MISSING = -(1 << 62)  # a pts, dts or position that the container does not have
# Packets on either side that tell what is usual, and so one more than may be wrong among them.
NEIGHBOURS = 4
# Steps that a stamp may be away from the middle of its neighbours: codecs reorder by up to 16.
FAR_STEPS = 24
# Packets in a row that may go astray before a jump back is a new part of the stream.
ASTRAY_PACKETS = 4


def mended_times(times: np.ndarray, dts: np.ndarray) -> np.ndarray:
    """Presentation times with damage and jumps of the clock taken out.

    times, dts: (N,) int64 in the stream's time base; dts may be MISSING, which changes nothing
    then, as it does where a time is MISSING. A stamp far from all around it (a spike) gets the
    place in between that is free. Where the decode clock jumps back for good (joined transport
    streams), the part behind continues one usual step after the part before.
    """
    if len(times) < 2 or (times == MISSING).any():
        return times
    times = _without_spikes(times)
    if (dts == MISSING).any():
        return times
    dts = _without_stray(_without_spikes(dts))
    steps = np.diff(dts)
    back = steps < 0
    if not back.any():
        return times
    shift = np.cumsum(np.where(back, _usual(steps) - steps, 0))
    shifted: np.ndarray = times + np.concatenate([np.zeros(1, np.int64), shift])
    return shifted


def _usual(steps: np.ndarray) -> int:
    ahead = steps[steps > 0]
    return int(np.median(ahead)) if len(ahead) else 1


def _without_spikes(times: np.ndarray) -> np.ndarray:
    """Stamps far from the median of those around them moved to where one of these lacks."""
    width = 2 * NEIGHBOURS + 1
    if len(times) < width:
        return times
    windows = np.sort(np.lib.stride_tricks.sliding_window_view(times, width), axis=1)
    # At both ends the first and the last whole window count.
    which = np.clip(np.arange(len(times)) - NEIGHBOURS, 0, len(windows) - 1)
    middle = windows[:, NEIGHBOURS]
    local = np.median(np.diff(windows, axis=1), axis=1)
    most = FAR_STEPS * np.maximum(local, _usual(np.diff(np.sort(times))))
    # As floats: differences of damaged numbers may not fit into 64 bits.
    away = np.abs(times.astype(np.float64) - middle[which].astype(np.float64))
    spikes = np.flatnonzero(away > most[which])
    if not len(spikes):
        return times
    mended = times.copy()
    sound = np.ones(len(times), bool)
    sound[spikes] = False
    for k in spikes.tolist():
        near = slice(max(0, k - 2 * NEIGHBOURS), k + 2 * NEIGHBOURS + 1)
        mended[k] = _free_place(mended[near][sound[near]], int(middle[which[k]]))
        sound[k] = True
    return mended


def _free_place(around: np.ndarray, middle: int) -> int:
    """The middle of the widest gap between stamps."""
    around = np.sort(around)
    if len(around) < 2:
        return middle
    widest = int(np.argmax(np.diff(around)))
    usual = _usual(np.diff(around))
    if around[widest + 1] - around[widest] > usual:
        return int(around[widest] + around[widest + 1]) // 2
    # None lacks: it was the first or the last of all.
    return (
        int(around[0]) - usual
        if middle < (around[0] + around[-1]) // 2
        else int(around[-1]) + usual
    )


def _without_stray(dts: np.ndarray) -> np.ndarray:
    """Decode times with a few in a row that leave an ascending line put back on it."""
    steps = np.diff(dts)
    backs = np.flatnonzero(steps < 0)
    if not len(backs):
        return dts
    usual = _usual(steps)
    dts = dts.copy()
    for k in backs.tolist():
        if dts[k + 1] >= dts[k]:
            continue  # mended with the one before
        for count in range(1, ASTRAY_PACKETS + 1):
            found = next(
                (
                    (a, b)
                    # Those before the step were ahead, or those behind it late.
                    for a, b in ((k - count, k + 1), (k, k + 1 + count))
                    if a >= 0 and b < len(dts) and dts[b] - dts[a] >= (count + 1) * usual / 2
                ),
                None,
            )
            if found is not None:
                a, b = found
                dts[a : b + 1] = np.linspace(dts[a], dts[b], b - a + 1).astype(np.int64)
                break
    return dts
