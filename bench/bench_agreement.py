"""Ask the embedded model about needle clips decoded by PyAV and by DALI; file how often it agrees.

python bench/bench_agreement.py [--codec vp9,mjpeg] [--seed S] [--num N] [--device D]
    [--dtype D] [--threads N]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vtts_rt.bench.encodings import ENCODINGS, codec_names, encode
from vtts_rt.bench.setting import (
    add_compute_flags,
    check_compute,
    dtype_of,
    origin,
    results_name,
    write_result,
)
from vtts_rt.config import RuntimeConfig
from vtts_rt.data.needle import Scene, make_question, make_scene, needle_row
from vtts_rt.perception.clue import option_letter
from vtts_rt.rounds.results import Answer
from vtts_rt.runtime import Runtime
from vtts_rt.types import Decoder, SamplingParams
from vtts_rt.video import open_video

RESULTS = Path(__file__).resolve().parent / "results"
MAX_TOKENS = 96  # an answer of the embedded model has about 40
GOP_SECONDS = 2.0  # as needle's own clips
DECODERS: tuple[Decoder, Decoder] = ("pyav", "dali")


def agreement(
    runtime: Runtime,
    *,
    codec: str,
    seed: int,
    num: int,
    on_clip: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Ask one question about each of `num` held-out needle clips through PyAV and through DALI.

    codec: of `ENCODINGS`, one that DALI decodes here; seed: of the first clip. on_clip(done,
    same answers so far): called after each.
    Returns {"codec", "seed", "num", "same_answer", "same_clues", "same_text", "accuracy",
    "differences"}: shares of the clips with the same option, the same clues in every round, the
    same text in every round; accuracy by decoder; of every clip whose text differs {"seed",
    "first": what differs first ("clue", "answer" or "text") and "round", "options", "right"}.
    RuntimeError where another decoder than DALI takes the files.
    """
    same: Counter[str] = Counter()
    right: Counter[str] = Counter()
    differences = []
    for done in range(num):
        scene = make_scene(seed + done, "held_out")
        row = needle_row(scene, make_question(scene, (seed + done) % len(scene.cards)), "clip")
        with tempfile.TemporaryDirectory() as folder:
            path = encode(
                Path(folder) / "clip",
                _frames(scene),
                codec,
                source_fps=scene.source_fps,
                gop=max(1, round(GOP_SECONDS * scene.source_fps)),
                crf=ENCODINGS[codec].crf,
            )
            if done == 0:
                _check(path)
            answers = []
            for decoder in DECODERS:
                runtime.clear_caches()
                answers.append(
                    runtime.ask(
                        path,
                        row.question,
                        options=row.options,
                        sampling=SamplingParams(max_tokens=MAX_TOKENS),
                        decoder=decoder,
                    )
                )
        options = [_option(answer, row.options) for answer in answers]
        for decoder, option in zip(DECODERS, options, strict=True):
            right[decoder] += option == row.answer
        first = _first_difference(*answers)
        same["answer"] += options[0] == options[1]
        same["clues"] += [r.regions for r in answers[0].rounds] == [
            r.regions for r in answers[1].rounds
        ]
        same["text"] += first is None
        if first is not None:
            differences.append(
                {"seed": seed + done, **first, "options": options, "right": row.answer}
            )
        if on_clip is not None:
            on_clip(done + 1, same["answer"])
    return {
        "codec": codec,
        "seed": seed,
        "num": num,
        **{f"same_{what}": same[what] / num for what in ("answer", "clues", "text")},
        "accuracy": {decoder: right[decoder] / num for decoder in DECODERS},
        "differences": differences,
    }


def _frames(scene: Scene) -> Iterator[np.ndarray]:
    return (scene.frame(index) for index in range(scene.num_frames))


def _check(path: Path) -> None:
    with open_video(path, decoder="dali") as source:
        used = source.metadata.decoder
    if used != "dali":
        raise RuntimeError(f"agreement: DALI does not decode {path.suffix} files here; {used} does")


def _option(answer: Answer, options: tuple[str, ...]) -> str | None:
    """The letter that the last answer of all rounds names."""
    said = [r.answer for r in answer.rounds if r.answer]
    index = option_letter(said[-1], options) if said else None
    return None if index is None else chr(ord("A") + index)


def _first_difference(a: Answer, b: Answer) -> dict[str, Any] | None:
    """Where the texts of two answers part: in a clue, an answer, or other words of a round."""
    for number, (x, y) in enumerate(zip(a.rounds, b.rounds, strict=False), 1):
        if x.text != y.text:
            first = (
                "clue" if x.regions != y.regions else "answer" if x.answer != y.answer else "text"
            )
            return {"first": first, "round": number}
    if len(a.rounds) != len(b.rounds):
        return {"first": "rounds", "round": min(len(a.rounds), len(b.rounds)) + 1}
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--codec", default="vp9,mjpeg", help="comma-separated")
    parser.add_argument("--seed", type=int, default=40000, help="of the first clip")
    parser.add_argument("--num", type=int, default=200, help="clips of each codec")
    add_compute_flags(parser, threads=1)
    args = parser.parse_args()
    check_compute(args)
    dtype = dtype_of(args, "tiny")
    codecs = codec_names(args.codec)

    def progress(done: int, same: int) -> None:
        print(f"\r{done}/{args.num} clips, {same} answered the same", end="", file=sys.stderr)

    config = RuntimeConfig(threads=args.threads)
    with Runtime.from_pretrained("tiny", dtype=dtype, device=args.device, config=config) as runtime:
        found = [
            agreement(runtime, codec=codec, seed=args.seed, num=args.num, on_clip=progress)
            for codec in codecs
        ]
        result = {
            **origin(args.threads),
            "dtype": dtype,
            "model": runtime.name,
            "split": "held_out",
            "results": found,
        }
    print(file=sys.stderr)
    write_result(RESULTS / results_name("agreement"), result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
