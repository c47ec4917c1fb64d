"""What a measured result must say: judges of result files, for `make accept`.

Each takes a result's JSON and returns whether it passes, and a sentence with the numbers. KeyError
or ValueError: the result lacks what is judged.
"""

from __future__ import annotations

from typing import Any

from vtts_rt.video.dali import MEAN_DIFFERENCE


def append_time(result: dict[str, Any]) -> tuple[bool, str]:
    ratios = {c["name"]: c["time_ratio"] for c in result["comparisons"]}
    return ratios["append"] <= 0.5, f"append takes {ratios['append']:.3f} of the loop's time"


def patchify_speed(result: dict[str, Any]) -> tuple[bool, str]:
    ours = [
        entry
        for entry in result["results"]
        if entry["name"].startswith("patchify") and entry["num_threads"] == 2
    ]
    # Fresh memory for every call, as the processor has: a reused output would be faster.
    best = max((e for e in ours if "reused" not in e["name"]), key=lambda e: e["speedup"])
    return best["speedup"] >= 3.0, f"{best['name']} is {best['speedup']:.1f} times as fast"


def needle_bar(result: dict[str, Any]) -> tuple[bool, str]:
    accuracy = {look["rounds"]: look["accuracy"] for look in result["rounds"]}
    gain = accuracy[3] - accuracy[1]
    said = f"{accuracy[1]:.1%} in one round, {accuracy[3]:.1%} in three, {result['num']} clips"
    return gain >= 0.30 and accuracy[1] <= 0.45 and result["num"] >= 500, said


def beats_peers(result: dict[str, Any]) -> tuple[bool, str]:
    speedup = result["ratios"]["speedup"]["append"]
    wanted = {"transformers loop": 2.5, "vllm loop": 2.5, "vllm append": 1.5}
    said = ", ".join(f"{speedup[peer]:.2f} times the {peer}" for peer in wanted)
    return all(speedup[peer] >= least for peer, least in wanted.items()), said


def five_rounds(result: dict[str, Any]) -> tuple[bool, str]:
    speedup = result["ratios"]["speedup"]["append"]["transformers loop"]
    return speedup >= 4.0, f"{speedup:.2f} times the transformers loop in five rounds"


def first_round(result: dict[str, Any]) -> tuple[bool, str]:
    ratio = result["ratios"]["round_1_time_ratio"]["official"]["vllm loop"]
    return ratio <= 1.1, f"one round takes {ratio:.2f} of vLLM's time"


def asked_again(result: dict[str, Any]) -> tuple[bool, str]:
    again = result["ratios"]["same_question_again"]["append"]
    ok = again["frames_decoded"] == again["pairs_encoded"] == 0 and again["tokens_prefilled"] < 16
    return ok, ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in again.items())


def one_video(result: dict[str, Any]) -> tuple[bool, str]:
    ratios = result["ratios"]["one_video_time_ratio"]
    said = ", ".join(f"{ratio:.2f} with {name}" for name, ratio in ratios.items())
    return min(ratios.values()) <= 1 / 3, f"8 askers take of 8 separate runs {said}"


def steady_memory(result: dict[str, Any]) -> tuple[bool, str]:
    slope, num = result["slope_mb_per_100_requests"], result["num_prompts"]
    caches = result["caches"].values()
    within = all(cache["peak_bytes"] <= cache["budget_bytes"] for cache in caches)
    grown = result["growth_mb"]  # the most after the warm-up, beyond what was there then
    said = f"{slope:+.2f} MB per 100 of {num} requests, {grown:.0f} of {result['budget_mb']:.0f} MB"
    return slope < 1.0 and num >= 1000 and within and grown <= result["budget_mb"], said


def has_command(result: dict[str, Any]) -> tuple[bool, str]:
    return result["command"].startswith("vtts-rt bench"), result["command"]


def patchify_targets(result: dict[str, Any]) -> tuple[bool, str]:
    """Of two threads: against the processor, and vectors against scalar code."""
    times = {entry["name"]: entry for entry in result["results"] if entry["num_threads"] == 2}
    fresh = [e for name, e in times.items() if name.startswith("patchify") and "reused" not in name]
    best = max(fresh, key=lambda entry: entry["speedup"])
    scalar, avx2 = (times[f"patchify {isa}"]["median_ms"] for isa in ("scalar", "avx2"))
    said = f"{best['speedup']:.1f} times the processor, AVX2 {scalar / avx2:.1f} times scalar"
    return best["speedup"] >= 4.0 and scalar >= 4.0 * avx2, said


def _best(row: dict[str, Any]) -> str:
    """The fastest backend of ours in a row of `vtts-rt bench ops`."""
    times = {n: t for n, t in row["median_us"].items() if n not in ("eager", "torch", "reference")}
    return min(times, key=lambda name: times[name])


def _rows(result: dict[str, Any], op: str) -> list[dict[str, Any]]:
    found = [row for row in result["results"] if row["op"] == op]
    if not found:
        raise ValueError(f"rows of {op}")
    return found


def gpu_patchify(result: dict[str, Any]) -> tuple[bool, str]:
    shares = [row["share_of_copy"][_best(row)] for row in _rows(result, "patchify")]
    return max(shares) >= 0.6, f"patchify at {max(shares):.0%} of a copy's bandwidth"


def gpu_processor(result: dict[str, Any]) -> tuple[bool, str]:
    best = max(row["speedup"] for row in result["results"] if row["name"].startswith("patchify"))
    return best >= 20.0, f"patchify {best:.1f} times transformers' processor on the GPU"


def gpu_patch_embed(result: dict[str, Any]) -> tuple[bool, str]:
    """What `auto` takes must not be slower than patchify and torch's product."""
    ratios = [
        row["median_us"][_best(row)] / row["median_us"]["unfused"]
        for row in _rows(result, "patch_embed")
    ]
    return max(ratios) <= 1.02, f"at worst {max(ratios):.2f} of the unfused time"


def gpu_decode(result: dict[str, Any]) -> tuple[bool, str]:
    """One sequence, launched the best way."""
    share = max(row["share_of_floor"] for row in result["results"] if row["sequences"] == 1)
    return share >= 0.8, f"a token at {share:.0%} of the bandwidth floor"


def gpu_cascade(result: dict[str, Any]) -> tuple[bool, str]:
    rows = [
        row
        for row in _rows(result, "cascade_attention")
        if row["case"].startswith("16 rows share 32768 ")
    ]
    ratio = max(row["median_us"]["eager"] / row["median_us"][_best(row)] for row in rows)
    return ratio >= 1.8, f"cascade {ratio:.2f} times plain at G = 16, 32k"


def gpu_rounds(result: dict[str, Any]) -> tuple[bool, str]:
    speedups = {entry["name"]: entry["speedup"] for entry in result["comparisons"]}
    said = ", ".join(f"{name} {speedup:.2f}" for name, speedup in speedups.items())
    return max(speedups.values()) >= 5.0, f"times the transformers loop: {said}"


def pixels_agree(result: dict[str, Any]) -> tuple[bool, str]:
    rows = result["differences"]
    if not rows:
        raise ValueError("a second decoder")
    worst = max(rows, key=lambda row: row["mean"])
    said = ", ".join(f"{row['decoder']} {row['codec']} {row['mean']:.2f}" for row in rows)
    return worst["mean"] <= MEAN_DIFFERENCE, f"mean differences from pyav: {said}"


def answers_agree(result: dict[str, Any]) -> tuple[bool, str]:
    rows = result["results"]
    said = ", ".join(f"{r['same_answer']:.1%} of {r['num']} {r['codec']} clips" for r in rows)
    enough = all(row["num"] >= 200 and row["same_answer"] >= 0.98 for row in rows)
    return enough and bool(rows), f"same answer on {said}"


def best_peer(result: dict[str, Any]) -> tuple[bool, str]:
    """H.264, which most files are; the other codecs are told too."""
    setting = result["setting"]
    size = [setting[name] for name in ("duration_seconds", "height", "width")]
    if size != [60, 720, 1280]:
        raise ValueError("a file of 60 s and 1280x720")
    ratios = {
        f"{entry['codec']} GOP {entry['gop']}": entry["time_ratio"]
        for entry in result["comparisons"]
        if entry["pattern"] == "uniform"
    }
    judged = [ratio for name, ratio in ratios.items() if name.startswith("h264")]
    if not judged:
        raise ValueError("H.264 or a peer")
    said = ", ".join(f"{ratio:.2f} for {name}" for name, ratio in ratios.items())
    return max(judged) <= 1.0, f"of the best peer's time {said}"


def seen_again(result: dict[str, Any]) -> tuple[bool, str]:
    least = min(row["again_speedup"] for row in result["results"] if row["name"] == "pyav")
    return least >= 50.0, f"seen frames at least {least:,.0f} times as fast as decoding"


def feed_busy(result: dict[str, Any]) -> tuple[bool, str]:
    busy = result["busy"]
    return busy >= 0.95, f"busy {busy:.1%} of the time"


def one_read(result: dict[str, Any]) -> tuple[bool, str]:
    """From the disk where that could be measured, else from memory; of the file of 720p. The others
    are told: opening costs some by the packet, so that files of few bytes are read faster."""
    rows = result["results"]
    cold = any(row["cold"] for row in rows)
    said, ok = [], False
    for height in dict.fromkeys(row["height"] for row in rows):
        here = [row for row in rows if row["height"] == height and row["cold"] == cold]
        seconds = {row["name"]: row["seconds"] for row in here}
        opening, read = seconds["open"], seconds["one read"]
        said.append(f"{height}p opened in {opening:.2f} s, read in {read:.2f} s")
        ok |= height == 720 and opening <= read
    return ok, f"{', '.join(said)} from {'the disk' if cold else 'memory'}"


def no_host_copies(result: dict[str, Any]) -> tuple[bool, str]:
    """Not a copy between the host and the GPU, in either direction, that could hold a frame."""
    if result["refusal"]:
        raise ValueError(result["refusal"])
    sizes = [result["copies"].get(kind, {"largest": 0})["largest"] for kind in ("HtoD", "DtoH")]
    frame = result["frame_bytes"]
    said = f"largest copies to and from the GPU {sizes} bytes, a frame has {frame:,}"
    return result["on_device"] and not result["frames_by_pyav"] and max(sizes) < frame, said
