"""Stamps of packets that are damaged here and there, or start over in joined streams.

Shape letters: N packets of a stream in file (decode) order.
"""

from __future__ import annotations

import numpy as np

MISSING = -(1 << 62)  # a pts, dts or position that the container does not have
# Packets on either side that tell what is usual: one less than may be wrong among them.
NEIGHBOURS = 4
# Steps that a stamp may be away from the middle of its neighbours, and packets by which a frame
# may show later than it is decoded: codecs reorder by up to 16.
FAR_STEPS, REORDER_PACKETS = 24, 17
# Packets in a row that may go astray before a jump back is a new part of the stream.
ASTRAY_PACKETS = 4
# Steps from the middle of its neighbours within which a spike has its place.
PLACE_STEPS = 6


def mended_times(times: np.ndarray, dts: np.ndarray) -> np.ndarray:
    """Presentation times with damage and jumps of the clock taken out.

    times, dts: (N,) int64 in the stream's time base. Where a time or dts is MISSING, times are
    given back as they are, as they are where decode times ascend and no frame shows long before or
    behind them. A stamp far from all around it (a spike) gets the place in between that is free;
    a few that leave the line together are put back on it. Where the decode clock jumps back for
    good (joined transport streams), the part behind continues one usual step after the part before.
    """
    if len(times) < 2 or (times == MISSING).any() or (dts == MISSING).any():
        return times
    told, dts = dts, _without_stray(dts)
    late = np.append(dts[REORDER_PACKETS:], np.full(min(REORDER_PACKETS, len(dts)), dts.max()))
    moved = dts != told
    delay = times - told
    if moved.any() and not moved.all():
        # Of these the presentation time is as wrong, unless it is further from it than of others.
        kept = delay[~moved]
        both = moved & (delay >= kept.min()) & (delay <= kept.max())
        times = np.where(both, dts + delay, times)
    steps = np.diff(dts)
    slack = float(FAR_STEPS * _usual(steps))
    for k in _spikes(times, dts - slack, late + slack):
        times = _placed(times, k)
    back = steps < 0
    if not back.any():
        return times
    shift = np.cumsum(np.where(back, _usual(steps) - steps, 0))
    shifted: np.ndarray = times + np.concatenate([np.zeros(1, np.int64), shift])
    return shifted


def _usual(steps: np.ndarray) -> int:
    ahead = steps[steps > 0]
    return int(np.median(ahead)) if len(ahead) else 1


def _spikes(times: np.ndarray, least: np.ndarray, most: np.ndarray) -> list[int]:
    """Packets with stamps out of `least` to `most` and far from the median of those around."""
    out = (times < least) | (times > most)
    width = 2 * NEIGHBOURS + 1
    if len(times) < width or not out.any():
        return []
    middle, steps = _middles(times)
    # As floats: differences of damaged numbers may not fit into 64 bits.
    away = np.abs(times.astype(np.float64) - middle)
    return np.flatnonzero(out & (away > FAR_STEPS * steps)).tolist()


def _middles(times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(N,) median of the stamps around each, and the usual step there."""
    width = 2 * NEIGHBOURS + 1
    windows = np.sort(np.lib.stride_tricks.sliding_window_view(times, width), axis=1)
    # At both ends the first and the last whole window count.
    which = np.clip(np.arange(len(times)) - NEIGHBOURS, 0, len(windows) - 1)
    steps = np.median(np.diff(windows.astype(np.float64), axis=1), axis=1)
    return windows[which, NEIGHBOURS].astype(np.float64), np.maximum(steps, 1.0)[which]


def _placed(times: np.ndarray, k: int) -> np.ndarray:
    """`times` with a new one for packet k: where one lacks among those around, else before or
    behind all of them."""
    first = max(0, k - 2 * REORDER_PACKETS)
    window = times[first : k + 2 * REORDER_PACKETS + 1]
    middles, all_steps = _middles(window)
    middle, usual = middles[k - first], all_steps[k - first]
    # Other spikes, which have no place yet, are far off.
    around = np.sort(window[np.abs(window.astype(np.float64) - middle) <= FAR_STEPS * usual])
    steps = np.diff(around)
    usual = _usual(steps)
    away = np.abs(around[:-1] + steps // 2 - middle)
    gaps = np.flatnonzero((steps > usual) & (away <= PLACE_STEPS * usual))
    if len(gaps):
        gap = gaps[np.argmin(away[gaps])]
        new = around[gap] + min(usual, int(steps[gap]) // 2)
    else:
        new = around[0] - usual if k <= NEIGHBOURS else around[-1] + usual
    times = times.copy()
    times[k] = new
    return times


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
