"""libvtts.so through ctypes: the structures of vtts.h, and calls with Python values."""

from __future__ import annotations

import ctypes as c
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

OK, INVALID, UNSUPPORTED = 0, 1, 2
STRATEGIES = ("official", "grid", "refresh", "append")


class Frame(c.Structure):
    _fields_ = [
        ("data", c.c_void_p),
        ("row_stride_bytes", c.c_int64),
        ("height", c.c_int64),
        ("width", c.c_int64),
    ]


class PixelBox(c.Structure):
    _fields_ = [(name, c.c_int64) for name in ("x0", "y0", "x1", "y1")]


class Job(c.Structure):
    _fields_ = [
        ("struct_size", c.c_uint32),
        ("resize", c.c_int32),
        ("frame_a", Frame),
        ("frame_b", Frame),
        ("box", PixelBox),
        ("resized_height", c.c_int64),
        ("resized_width", c.c_int64),
    ]


class Options(c.Structure):
    _fields_ = [
        ("struct_size", c.c_uint32),
        ("isa", c.c_int32),
        ("num_threads", c.c_int32),
        ("mean", c.c_float * 3),
        ("std", c.c_float * 3),
    ]


class Weights(c.Structure):
    _fields_ = [
        ("struct_size", c.c_uint32),
        ("reserved", c.c_uint32),
        ("weight", c.c_void_p),
        ("bias", c.c_void_p),
        ("num_outputs", c.c_int64),
    ]


class CudaLaunch(c.Structure):
    _fields_ = [
        ("struct_size", c.c_uint32),
        ("dtype", c.c_int32),
        ("places", c.c_void_p),
        ("workspace", c.c_void_p),
        ("workspace_bytes", c.c_int64),
        ("cuda_stream", c.c_void_p),
    ]


class Range(c.Structure):
    _fields_ = [("begin", c.c_int64), ("end", c.c_int64)]


class Clue(c.Structure):
    _fields_ = [
        ("struct_size", c.c_uint32),
        ("num_spans", c.c_int32),
        ("num_boxes", c.c_int32),
        ("num_problems", c.c_int32),
        ("think", Range),
        ("answer", Range),
        ("glue", Range),
        ("glue_is_empty_list", c.c_int32),
        ("reserved", c.c_int32),
        ("spans", c.c_double * 2 * 64),
        ("boxes", c.c_double * 4 * 64),
        ("problems", c.c_char_p * 8),
    ]


class Config(c.Structure):
    _fields_ = [
        ("struct_size", c.c_uint32),
        ("reserved", c.c_uint32),
        ("sample_fps", c.c_double),
        ("min_frames", c.c_int64),
        ("max_frames", c.c_int64),
        ("min_pixels", c.c_int64),
        ("total_pixels", c.c_int64),
        ("key_ratio", c.c_double),
        ("focus_frames", c.c_int64),
        ("focus_margin_cells", c.c_double),
    ]


class Video(c.Structure):
    _fields_ = [
        ("struct_size", c.c_uint32),
        ("is_image", c.c_int32),
        ("num_frames", c.c_int64),
        ("source_fps", c.c_double),
        ("duration_seconds", c.c_double),
        ("height", c.c_int64),
        ("width", c.c_int64),
        ("timestamps_seconds", c.c_void_p),
    ]


class Pair(c.Structure):
    _fields_ = [
        ("video", c.c_int64),
        ("frame_a", c.c_int64),
        ("frame_b", c.c_int64),
        ("time_seconds", c.c_double),
    ]


class Segment(c.Structure):
    _fields_ = [
        ("video", c.c_int64),
        ("first_pair", c.c_int64),
        ("num_pairs", c.c_int64),
        ("box", PixelBox),
        ("resized_height", c.c_int64),
        ("resized_width", c.c_int64),
        ("seconds_per_grid", c.c_double),
        ("is_image", c.c_int64),
    ]


class View(c.Structure):
    _fields_ = [
        ("video", c.c_int64),
        ("box", PixelBox),
        ("resized_height", c.c_int64),
        ("resized_width", c.c_int64),
        ("first_span", c.c_int64),
        ("num_spans", c.c_int64),
        ("cell_seconds", c.c_double),
        ("level", c.c_int64),
    ]


class Region(c.Structure):
    _fields_ = [
        ("video", c.c_int64),
        *((n, c.c_double) for n in ("start_seconds", "end_seconds", "x0", "y0", "x1", "y1")),
    ]


class PlanInfo(c.Structure):
    _fields_ = [
        ("struct_size", c.c_uint32),
        ("reserved", c.c_uint32),
        ("round_index", c.c_int64),
        ("sample_fps", c.c_double),
        *(
            (f"num_{n}", c.c_int64)
            for n in ("segments", "pairs", "frames", "views", "view_spans", "regions", "notes")
        ),
        ("segments", c.POINTER(Segment)),
        ("pairs", c.POINTER(Pair)),
        ("frame_indices", c.POINTER(c.c_int64)),
        ("timestamps_seconds", c.POINTER(c.c_double)),
        ("views", c.POINTER(View)),
        ("view_spans", c.POINTER(c.c_double)),
        ("regions", c.POINTER(Region)),
        ("notes", c.POINTER(c.c_char_p)),
    ]


DEFAULTS = {
    "patchify_job": Job,
    "patchify_options": Options,
    "patch_embed_weights": Weights,
    "patch_embed_folded": Weights,
    "cuda_launch": CudaLaunch,
    "clue": Clue,
    "perception_config": Config,
    "video_info": Video,
    "plan_info": PlanInfo,
}


@functools.lru_cache(maxsize=1)
def library() -> c.CDLL:
    """The installed libvtts.so; skips the test where the package was built without it."""
    import pytest

    import vtts_rt

    try:
        lib = c.CDLL(vtts_rt.get_library())
    except RuntimeError as error:
        pytest.skip(str(error))
    for name, struct in DEFAULTS.items():
        getattr(lib, f"vtts_{name}_default").restype = struct
    lib.vtts_last_error_message.restype = c.c_char_p
    lib.vtts_version.restype = lib.vtts_status_name.restype = c.c_char_p
    lib.vtts_planner_free.argtypes = lib.vtts_plan_free.argtypes = [c.c_void_p]
    lib.vtts_planner_free.restype = lib.vtts_plan_free.restype = None
    return lib


def default(name: str) -> Any:
    return getattr(library(), f"vtts_{name}_default")()


class Refused(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def call(name: str, *arguments: Any) -> None:
    """One call; Refused with the library's sentence unless it returns VTTS_OK."""
    status = getattr(library(), f"vtts_{name}")(*arguments)
    if status != OK:
        raise Refused(status, library().vtts_last_error_message().decode())


def parse_clue(text: bytes) -> Clue:
    clue = default("clue")
    call("clue_parse", text, c.c_int64(len(text)), c.byref(clue))
    return clue


def make_clue(spans: Sequence[Any] = (), boxes: Sequence[Any] = ()) -> Clue:
    clue = default("clue")
    clue.num_spans, clue.num_boxes = len(spans), len(boxes)
    for i, span in enumerate(spans):
        clue.spans[i][:] = span
    for i, box in enumerate(boxes):
        clue.boxes[i][:] = box
    return clue


def clue_dict(clue: Clue) -> dict[str, Any]:
    return {
        **{name: [getattr(clue, name).begin, getattr(clue, name).end] for name in TAGS},
        "spans": [list(clue.spans[i]) for i in range(clue.num_spans)],
        "boxes": [list(clue.boxes[i]) for i in range(clue.num_boxes)],
        "problems": [clue.problems[i].decode() for i in range(clue.num_problems)],
        "glue_is_empty_list": bool(clue.glue_is_empty_list),
    }


TAGS = ("think", "answer", "glue")


class Planner:
    """Rounds of one question; config and videos as dicts of the structures' fields."""

    def __init__(self, strategy: str, config: dict[str, Any], videos: Sequence[dict[str, Any]]):
        settings = default("perception_config")
        for name, value in config.items():
            setattr(settings, name, value)
        array = (Video * len(videos))()
        alive = []
        for target, video in zip(array, videos, strict=True):
            target.struct_size = c.sizeof(Video)
            for name, value in video.items():
                if name == "timestamps_seconds":
                    alive.append((c.c_double * len(value))(*value))
                    value = c.cast(alive[-1], c.c_void_p)
                setattr(target, name, value)
        self._handle = c.c_void_p()
        number = STRATEGIES.index(strategy)
        count = c.c_int64(len(videos))
        call("planner_create", number, c.byref(settings), array, count, c.byref(self._handle))

    def next(self, clue: Clue | None = None, *, forced: bool = False) -> dict[str, Any]:
        plan, info = c.c_void_p(), default("plan_info")
        call(
            "planner_next",
            self._handle,
            c.byref(clue) if clue else None,
            int(forced),
            c.byref(plan),
        )
        try:
            call("plan_get_info", plan, c.byref(info))
            return plan_dict(info)
        finally:
            library().vtts_plan_free(plan)

    def __del__(self) -> None:
        library().vtts_planner_free(self._handle)


def plan_dict(info: PlanInfo) -> dict[str, Any]:
    def box(b: PixelBox) -> list[int]:
        return [b.x0, b.y0, b.x1, b.y1]

    pairs = [[p.video, p.frame_a, p.frame_b, p.time_seconds] for p in info.pairs[: info.num_pairs]]
    spans = [info.view_spans[2 * i : 2 * i + 2] for i in range(info.num_view_spans)]
    return {
        "round_index": info.round_index,
        "sample_fps": info.sample_fps,
        "segments": [
            {
                "pairs": pairs[s.first_pair : s.first_pair + s.num_pairs],
                "box": box(s.box),
                "resized_hw": [s.resized_height, s.resized_width],
                "seconds_per_grid": s.seconds_per_grid,
                "is_image": bool(s.is_image),
            }
            for s in info.segments[: info.num_segments]
        ],
        "frame_indices": info.frame_indices[: info.num_frames],
        "timestamps_seconds": info.timestamps_seconds[: info.num_frames],
        "views": [
            {
                "box": box(v.box),
                "resized_hw": [v.resized_height, v.resized_width],
                "spans": spans[v.first_span : v.first_span + v.num_spans],
                "cell_seconds": v.cell_seconds,
                "level": v.level,
            }
            for v in info.views[: info.num_views]
        ],
        "regions": [
            [r.video, r.start_seconds, r.end_seconds, r.x0, r.y0, r.x1, r.y1]
            for r in info.regions[: info.num_regions]
        ],
        "notes": [note.decode() for note in info.notes[: info.num_notes]],
    }


def page_hashes(keys: np.ndarray, page_size: int, space: bytes = b"") -> list[str]:
    out = (c.c_uint8 * (16 * max(len(keys) // page_size, 1)))()
    keys = np.ascontiguousarray(keys, dtype=np.int64)
    call(
        "page_hashes",
        c.c_void_p(keys.ctypes.data),
        c.c_int64(len(keys)),
        c.c_int64(page_size),
        space,
        c.c_int64(len(space)),
        out,
    )
    raw = bytes(out)
    return [raw[16 * i : 16 * i + 16].hex() for i in range(len(keys) // page_size)]


def pair_content_id(
    video_id: str, frame_a: int, frame_b: int, box: Sequence[int], resized_hw: Sequence[int]
) -> int:
    found = c.c_int64()
    name = video_id.encode()
    numbers = [c.c_int64(v) for v in (frame_a, frame_b)]
    sizes = [c.c_int64(v) for v in resized_hw]
    call(
        "pair_content_id", name, c.c_int64(len(name)), *numbers, PixelBox(*box), *sizes,
        c.byref(found),
    )  # fmt: skip
    return found.value


def smart_resize(height: int, width: int, min_pixels: int, max_pixels: float) -> list[int]:
    h, w = c.c_int64(), c.c_int64()
    sides = c.c_int64(height), c.c_int64(width), c.c_int64(min_pixels), c.c_double(max_pixels)
    call("smart_resize", *sides, c.byref(h), c.byref(w))
    return [h.value, w.value]


def job(frames: Sequence[np.ndarray], box: Sequence[int], resized_hw: Sequence[int]) -> Job:
    """A job of two (H, W, 3) uint8 arrays, which the caller keeps."""
    views = [Frame(f.ctypes.data, f.strides[0], f.shape[0], f.shape[1]) for f in frames]
    return Job(c.sizeof(Job), 0, *views, PixelBox(*box), *resized_hw)


def jobs(items: Sequence[Job]) -> Any:
    return (Job * len(items))(*items)


def num_rows(items: Sequence[Job]) -> int:
    found = c.c_int64()
    call("patchify_num_rows", jobs(items), c.c_int64(len(items)), c.byref(found))
    return found.value


def patchify(items: Sequence[Job], **options: int) -> np.ndarray:
    settings = default("patchify_options")
    for name, value in options.items():
        setattr(settings, name, value)
    out = np.full((num_rows(items), 1176), np.nan, dtype=np.float32)
    call(
        "patchify_cpu",
        jobs(items),
        c.c_int64(len(items)),
        c.byref(settings),
        c.c_void_p(out.ctypes.data),
    )
    return out
