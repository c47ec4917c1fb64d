"""The acceptance list: a line for every promise of an issue, and what proves it."""

from __future__ import annotations

import re

import targets
from evidence import (
    ROOT,
    Line,
    documented,
    fresh_clone,
    fresh_needle,
    light_environment,
    measured,
    readme_command,
    tests,
)

# Tests of Triton kernels in the interpreter; others of an op need a GPU or another processor.
INTERPRETED = [
    f"{path.relative_to(ROOT).as_posix()}::{name}"
    for path in sorted((ROOT / "tests" / "ops").glob("test_*.py"))
    for name in re.findall(
        r"^def (test_\w+_under_the_interpreter)\(", path.read_text(), re.MULTILINE
    )
]


def _files(pattern: str) -> list[str]:
    """Test files by a pattern; the pattern itself, which is no test, where there are none."""
    found = sorted(ROOT.glob(pattern))
    return [path.relative_to(ROOT).as_posix() for path in found] or [pattern]


LINES = (
    Line(
        2,
        "fresh clone: `make ask` answers on the shipped clip, `make test` passes, both reuse",
        (light_environment, fresh_clone),
    ),
    Line(
        2,
        "logits equal transformers' on four tiny configurations to 1e-4 in fp32",
        (tests("tests/models/test_parity.py::test_logits_equal_transformers"),),
    ),
    Line(
        2,
        "`official` with hf5 is token for token the transformers loop, 3 rounds",
        (tests("tests/test_official_parity.py"),),
    ),
    Line(
        2,
        "`append` decodes, encodes and prefills only what is new; logits equal one full prefill",
        (
            tests(
                "tests/test_runtime.py::test_append_pays_only_for_what_is_new",
                "tests/engine/test_engine.py::test_an_appended_round_prefills_only_what_is_new",
            ),
        ),
    ),
    Line(
        2,
        "three rounds of `append` take at most half the time of the loop",
        (measured("rounds", targets.append_time),),
    ),
    Line(
        2,
        "patchify at least 3x transformers' processor, 32 frames of 1280x720, 2 threads",
        (measured("patchify", targets.patchify_speed),),
    ),
    Line(
        2,
        "needle: three rounds at least 30 points above one, one at most 45 %, fresh seeds",
        (
            tests("tests/data/test_needle.py::test_the_coarse_pass_cannot_be_read"),
            measured("needle", targets.needle_bar),
            fresh_needle,
        ),
    ),
    Line(
        3,
        "at least 200 random interleavings, every output that of the request alone",
        (tests("tests/engine/test_interleavings.py"),),
    ),
    Line(
        3,
        "three rounds: 2.5x the loop on transformers and on vLLM, 1.5x vLLM in our layout",
        (measured("rounds", targets.beats_peers), measured("rounds", targets.has_command)),
    ),
    Line(
        3,
        "five rounds: 4x the loop on transformers",
        (measured("rounds5", targets.five_rounds), measured("rounds5", targets.has_command)),
    ),
    Line(3, "one round within 10 % of vLLM's time", (measured("rounds", targets.first_round),)),
    Line(
        3,
        "the same question again decodes and encodes nothing, prefills less than a page",
        (
            measured("rounds", targets.asked_again),
            tests("tests/test_runtime.py::test_the_same_question_again_costs_nothing"),
        ),
    ),
    Line(
        3,
        "8 askers on one video take at most a third of 8 separate runs",
        (measured("onevideo", targets.one_video), measured("onevideo", targets.has_command)),
    ),
    Line(
        3,
        "1,000 mixed requests: memory grows by less than 1 MB per 100 and stays under budget",
        (measured("soak", targets.steady_memory), measured("soak", targets.has_command)),
    ),
    Line(
        3,
        "two videos never share a key; faults end their own request",
        (
            tests("tests/test_keys.py", "tests/engine/test_scheduler.py"),
            tests("tests/test_concurrency.py"),
        ),
    ),
    Line(3, "`vtts-rt bench rounds --peer hf` runs as README says", (readme_command,)),
    Line(
        3,
        "docs: the life of a request in eight steps, what each key holds, strategies compared",
        (
            documented(
                "architecture.md", "## The life of a request", "\n8. ", "## What a cache key"
            ),
            documented("strategies.md", "Generated from `strategies_"),
        ),
    ),
    Line(
        4,
        "the C interface: golden vectors, differential fuzzing, C99, wheel, examples bit for bit",
        (tests("tests/csrc", "tests/test_wheel.py"),),
    ),
    Line(
        4,
        "every Triton kernel in the interpreter; all compiled for three GPUs, no spill unexplained",
        (tests("tests/test_kernels.py", *INTERPRETED),),
    ),
    Line(
        4,
        "error tables by kernel and dtype are generated into docs/ops.md",
        (
            documented("ops.md", "Generated from `errors_"),
            tests(
                "tests/test_ops_complete.py::test_the_error_table_has_a_row_for_every_backend",
                "tests/test_report.py::test_the_tables_of_this_checkout_are_current",
            ),
        ),
    ),
    Line(
        4,
        "adding an op takes seven documented steps; every op has all its places under one name",
        (tests("tests/test_ops_complete.py"),),
    ),
    Line(
        4,
        "`vtts-rt env` prints every dispatch choice with its reason",
        (tests("tests/test_environment.py"),),
    ),
    Line(
        4,
        "CPU: patchify 4x transformers' processor, AVX2 4x scalar",
        (measured("patchify", targets.patchify_targets),),
    ),
    *(
        Line(4, f"GPU: {text}", (measured(theme, judge, gpu=True),))
        for text, theme, judge in (
            ("patchify at 60 % of copy bandwidth", "ops", targets.gpu_patchify),
            ("patchify 20x transformers' processor", "processor", targets.gpu_processor),
            ("patch_embed not slower than with cuBLAS", "ops", targets.gpu_patch_embed),
            ("a 7B token at 80 % of the floor", "decode7b", targets.gpu_decode),
            ("cascade 1.8x plain at G = 16, 32k", "ops", targets.gpu_cascade),
            ("three rounds 5x the loop at 7B shapes", "device7b", targets.gpu_rounds),
        )
    ),
    Line(
        5,
        "decoders agree within the stated pixel tolerance; equal pixels give equal tokens",
        (
            tests(
                "tests/video/test_dali.py::test_pixels_within_the_stated_tolerance_of_pyav",
                "tests/video/test_dali.py::test_equal_pixels_give_equal_tokens",
            ),
            measured("video", targets.pixels_agree),
        ),
    ),
    Line(
        5,
        "the same needle answer through PyAV and DALI on at least 98 % of 200 clips",
        (measured("agreement", targets.answers_agree),),
    ),
    Line(
        5,
        "the robustness list is a parametrised test over generated files",
        (tests(*_files("tests/video/test_robust*.py")),),
    ),
    Line(
        5, "DALI's tests run without a GPU", (tests("tests/video/test_dali.py", marks="not cuda"),)
    ),
    Line(
        5,
        "without DALI all else works, and who asks for it hears what to install",
        (tests("tests/video/test_dali_absent.py"),),
    ),
    Line(
        5,
        "64 frames of a 60 s 720p file no slower than with the best peer",
        (measured("video", targets.best_peer),),
    ),
    Line(
        5,
        "seen frames again at least 50 times faster than decoding them",
        (measured("video", targets.seen_again),),
    ),
    Line(
        5,
        "feed: resumable, sharded, decodes a video once; its consumer is busy 95 % of the time",
        (tests(*_files("tests/data/test_feed*.py")), measured("feed", targets.feed_busy)),
    ),
    Line(
        5,
        "frames asked for by the last clue are fetched ahead, counted and cancelled",
        (tests(*_files("tests/video/test_prefetch*.py"), "tests/test_prefetch_rounds.py"),),
    ),
    Line(
        5,
        "the index cache is invalidated by content and safe under processes",
        (tests(*_files("tests/video/test_index_cache*.py")),),
    ),
    Line(
        5,
        "2 h of video open in bounded memory; a look into them decodes its groups of pictures",
        (tests(*_files("tests/video/test_long*.py")),),
    ),
    Line(
        5,
        "2 h of video open within the time of one sequential read",
        (measured("open", targets.one_read),),
    ),
    Line(
        5,
        "GPU: frames reach patchify with no copy to the host and back",
        (measured("nvdec", targets.no_host_copies, gpu=True),),
    ),
)
