"""patchify against torch's resize, its reference, and itself."""

from __future__ import annotations

import importlib
import importlib.util

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from patch_tools import ISAS, full, noise, on_isa, one
from triton_tools import check_interpreted, run_triton
from utils import QWEN3_VL, UNEVEN

from vtts_rt.models.qwen2_5_vl import GEOMETRY
from vtts_rt.ops import dispatch
from vtts_rt.ops.patch_embed import PatchEmbedWeight, patch_embed
from vtts_rt.ops.patch_jobs import MAX_EXTENT
from vtts_rt.ops.patchify import PatchBuffer, PatchifyJob, patchify, patchify_ref
from vtts_rt.types import RESIZE_KERNELS, Geometry, PixelBox, ResizeKernel

_C = pytest.importorskip("vtts_rt._C", reason="built without the native extension")


def test_smooth_content_equals_torch_resize() -> None:
    """A ramp with clipped overshoot at its edges, through torch's own operator."""
    y, x = np.mgrid[0:90, 0:131]
    frame = np.stack([(2 * x) % 256, 255 * (x > 60), (y * 3 + x) % 256], axis=-1).astype(np.uint8)
    height, width = 84, 56
    pixels = torch.from_numpy(frame).permute(2, 0, 1)[None]
    resized = F.interpolate(pixels, (height, width), mode="bicubic", antialias=True)
    expected = patchify_ref([one(resized[0].permute(1, 2, 0), (height, width))], GEOMETRY)
    assert torch.equal(patchify([one(frame, (height, width))], GEOMETRY), expected)


@pytest.mark.parametrize("geometry", [GEOMETRY, UNEVEN], ids=["14 px", "16 px"])
def test_normalisation_is_a_subtraction_and_a_division_for_every_value(geometry: Geometry) -> None:
    side, patch_px = geometry.token_px, geometry.patch_px
    values = np.arange(side * side).astype(np.uint8).reshape(side, side, 1).repeat(3, axis=2)
    mean, std = torch.tensor(geometry.mean) * 255.0, torch.tensor(geometry.std) * 255.0
    for isa in ISAS:
        rows = on_isa([one(values, (side, side))], isa, 1, geometry)
        rows = rows.view(2, 2, 3, 2, patch_px, patch_px)
        pixels = rows.permute(3, 0, 4, 1, 5, 2).reshape(2, side, side, 3)
        assert torch.equal(pixels[0], (torch.from_numpy(values).float() - mean) / std)
        assert torch.equal(pixels[0], pixels[1])


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_path_gives_the_same_bits(data: st.DataObject) -> None:
    """Reference, scalar and AVX2, one thread and several, on any shapes, boxes and kernels."""
    geometry = data.draw(st.sampled_from((GEOMETRY, UNEVEN)))
    side, jobs = geometry.token_px, []
    for index in range(data.draw(st.integers(1, 3))):
        height, width = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 70))
        x0, y0 = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
        x1, y1 = data.draw(st.integers(x0 + 1, width)), data.draw(st.integers(y0 + 1, height))
        size = (side * data.draw(st.integers(1, 3)), side * data.draw(st.integers(1, 3)))
        a = noise(height, width, 3, seed=index)
        b = a if data.draw(st.booleans()) else 255 - a
        kernel = data.draw(st.sampled_from(RESIZE_KERNELS))
        jobs.append(PatchifyJob(a, b, PixelBox(x0, y0, x1, y1), size, kernel))
    expected = patchify_ref(jobs, geometry)
    for isa in ISAS:
        for num_threads in (1, 3):
            assert torch.equal(on_isa(jobs, isa, num_threads, geometry), expected), isa


@pytest.mark.parametrize("resize", RESIZE_KERNELS)
@pytest.mark.parametrize(
    ("shape", "size"),
    [((1, 1), (28, 28)), ((1, 3000), (28, 56)), ((2500, 2), (28, 28)), ((500, 37), (56, 28))],
)
def test_extreme_shapes(
    resize: ResizeKernel, shape: tuple[int, int], size: tuple[int, int]
) -> None:
    job = one(noise(*shape, 3), size, resize=resize)
    expected = patchify_ref([job], GEOMETRY)
    for isa in ISAS:
        assert torch.equal(on_isa([job], isa), expected), isa


def test_a_large_reduction_equals_torch() -> None:
    """Hundreds of taps, whose int16 weights carry up to 22 fractional bits."""
    frame, size = noise(1200, 1600, 3), (28, 28)
    pixels = torch.from_numpy(frame).permute(2, 0, 1)[None]
    resized = F.interpolate(pixels, size, mode="bicubic", antialias=True)[0].permute(1, 2, 0)
    assert torch.equal(
        patchify([one(frame, size)], GEOMETRY), patchify_ref([one(resized, size)], GEOMETRY)
    )


@pytest.mark.parametrize("resize", RESIZE_KERNELS)
@pytest.mark.parametrize("size", [(28, 28), (56, 84), (28, 56)])
def test_memory_around_the_frame_is_not_read_into_the_result(
    resize: ResizeKernel, size: tuple[int, int]
) -> None:
    """The same crop inside two different surroundings."""
    inside = noise(40, 41, 3)
    box = PixelBox(5, 3, 46, 43)
    results = []
    for filling in (0, 255):
        frame = np.full((50, 60, 3), filling, dtype=np.uint8)
        frame[3:43, 5:46] = inside
        results.append(patchify([one(frame, size, box, resize)], GEOMETRY))
    results.append(patchify([one(inside, size, resize=resize)], GEOMETRY))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_strided_planar_and_torch_frames() -> None:
    packed = noise(60, 70, 3)
    wide = np.zeros((120, 90, 3), dtype=np.uint8)
    wide[::2, 10:80] = packed
    planar = np.ascontiguousarray(packed.transpose(2, 0, 1)).transpose(1, 2, 0)
    upside_down = np.ascontiguousarray(packed[::-1])[::-1]
    expected = patchify([one(packed, (56, 56))], GEOMETRY)
    read_only = packed.copy()
    read_only.flags.writeable = False
    for frame in (wide[::2, 10:80], planar, upside_down, read_only, torch.from_numpy(packed)):
        assert torch.equal(patchify([one(frame, (56, 56))], GEOMETRY), expected)


def test_the_two_frames_may_differ_in_size_and_order_matters() -> None:
    a, b = noise(40, 50, 3, seed=1), noise(60, 45, 3, seed=2)
    box = PixelBox(2, 3, 44, 39)
    rows = patchify([PatchifyJob(a, b, box, (56, 28))], GEOMETRY).view(-1, 3, 2, 196)
    only_a = patchify([one(a, (56, 28), box)], GEOMETRY).view(-1, 3, 2, 196)
    only_b = patchify([one(b, (56, 28), box)], GEOMETRY).view(-1, 3, 2, 196)
    assert torch.equal(rows[:, :, 0], only_a[:, :, 0])
    assert torch.equal(rows[:, :, 1], only_b[:, :, 0])


def test_out_is_written_in_place_and_threads_change_nothing() -> None:
    frames = noise(6, 100, 120, 3)
    jobs = [PatchifyJob(frames[i], frames[i + 1], full(frames[i]), (84, 56)) for i in range(5)]
    expected = patchify(jobs, GEOMETRY, num_threads=1)
    out = torch.full_like(expected, torch.nan)
    assert patchify(jobs, GEOMETRY, num_threads=5, out=out) is out
    assert torch.equal(out, expected)
    reference_out = torch.full_like(expected, torch.nan)
    assert patchify_ref(jobs, GEOMETRY, out=reference_out) is reference_out
    assert torch.equal(reference_out, expected)


def test_a_buffer_keeps_its_memory_and_fits_every_pass() -> None:
    frames = noise(4, 60, 70, 3)
    large = [one(frame, (56, 84)) for frame in frames]
    buffer = PatchBuffer(GEOMETRY)
    assert buffer.rows_for([]).shape == (0, 1176)
    memory = set()
    for jobs in (large, large[:1], [one(frames[2], (28, 28))], large[1:]):
        rows = patchify(jobs, GEOMETRY, out=buffer.rows_for(jobs))
        assert torch.equal(rows, patchify(jobs, GEOMETRY))
        memory.add(rows.data_ptr())
    assert len(memory) == 1


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("index", [None, torch.int32, torch.int64])
def test_rows_are_rounded_and_go_to_their_places(
    backend: str, dtype: torch.dtype, index: torch.dtype | None
) -> None:
    jobs = [one(noise(40, 50, 3), (56, 28)), one(noise(30, 29, 3, seed=1), (28, 84))]
    places = None if index is None else torch.tensor([3, 0, 4, 2, 1], dtype=index)
    expected = patchify(jobs, GEOMETRY).to(dtype).view(5, -1)
    if places is not None:
        expected = expected[places.argsort()]
    out = torch.full((20, 1176), torch.nan, dtype=dtype)
    rows = patchify(jobs, GEOMETRY, dtype=dtype, places=places, backend=backend, out=out)
    assert rows is out and torch.equal(out.view(5, -1), expected)
    assert torch.equal(patchify_ref(jobs, GEOMETRY, dtype=dtype, places=places), out)


PATCHES_OF_16_PX = """
import torch
from vtts_rt.ops.patchify import PatchifyJob, patchify, patchify_ref
from vtts_rt.types import Geometry, PixelBox

geometry = Geometry(16, mean=(0.31, 0.07, 0.9), std=(0.7, 0.11, 1.3))
a, b = torch.randint(0, 256, (2, 71, 53, 3), dtype=torch.uint8, generator=torch.Generator())
for resize in ("fixed", "float", "pil"):
    jobs = [
        PatchifyJob(a, b, PixelBox(1, 2, 50, 70), (32, 64), resize),
        PatchifyJob(b, b, PixelBox(0, 0, 32, 32), (32, 32), resize),
        PatchifyJob(a, a, PixelBox(0, 0, 53, 9), (64, 32), resize),
    ]
    for dtype in (torch.float32, torch.float16):  # bfloat16 is cut off in the interpreter
        places = torch.tensor([3, 0, 4, 2, 1])
        rows = patchify(jobs, geometry, dtype=dtype, places=places, backend="triton")
        assert torch.equal(rows, patchify_ref(jobs, geometry, dtype=dtype, places=places)), resize
print("done")
"""


@pytest.mark.slow
def test_triton_under_the_interpreter() -> None:
    assert check_interpreted("patchify") == 17
    assert run_triton(PATCHES_OF_16_PX, interpret=True).split() == ["done"]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_no_jobs_give_no_rows(backend: str) -> None:
    rows = patchify([], GEOMETRY, backend=backend)
    assert rows.shape == (0, 1176) and rows.dtype == torch.float32


FRAME = noise(40, 50, 3)
WHOLE = full(FRAME)


@pytest.mark.parametrize(
    ("job", "message"),
    [
        (one(FRAME, (28, 28), PixelBox(0, 0, 51, 40)), "box must be not empty and inside"),
        (one(FRAME, (28, 28), PixelBox(-1, 0, 50, 40)), "box must be not empty and inside"),
        (one(FRAME, (28, 28), PixelBox(7, 0, 7, 40)), "box must be not empty and inside"),
        (one(FRAME, (28, 28), PixelBox(0, 30, 50, 20)), "box must be not empty and inside"),
        (one(FRAME, (30, 28), WHOLE), "resized_hw must be positive multiples of 28"),
        (one(FRAME, (28, 0), WHOLE), "resized_hw must be positive multiples of 28"),
        (one(FRAME.astype(np.float32), (28, 28)), r"frame_a must be \(H, W, 3\) uint8"),
        (one(FRAME[..., :2], (28, 28)), r"frame_a must be \(H, W, 3\) uint8"),
        (one(FRAME[0], (28, 28), WHOLE), r"frame_a must be \(H, W, 3\) uint8"),
        (one(np.zeros((0, 5, 3), np.uint8), (28, 28)), "frame_a must be 1 to"),
        (PatchifyJob(FRAME, FRAME[:39], WHOLE, (28, 28)), "box must be not empty and inside"),
        (PatchifyJob(FRAME, FRAME.tolist(), WHOLE, (28, 28)), "frame_b must be a numpy array"),
        (
            one(torch.empty(40, 50, 3, dtype=torch.uint8, device="meta"), (28, 28), WHOLE),
            "frame_a must be on cpu or cuda, got 'a tensor on meta'",
        ),
    ],
)
def test_bad_jobs_are_refused(job: PatchifyJob, message: str) -> None:
    for call in (patchify, patchify_ref):
        with pytest.raises(ValueError, match="patchify: " + message):
            call([one(FRAME, (28, 28)), job], GEOMETRY)


def test_sizes_are_multiples_of_the_geometrys_tokens() -> None:
    for size in ((28, 28), (56, 84)):
        with pytest.raises(ValueError, match="resized_hw must be positive multiples of 32 px"):
            patchify([one(FRAME, size)], QWEN3_VL)


def test_bad_options_are_refused() -> None:
    job = one(FRAME, (28, 28))
    with pytest.raises(ValueError, match="resize must be fixed, float or pil, got 'cubic'"):
        patchify([one(FRAME, (28, 28), resize="cubic")], GEOMETRY)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_threads must be >= 0"):
        patchify([job], GEOMETRY, num_threads=-1)
    for out in (torch.empty(4, 1175), torch.empty(4, 1176).double(), torch.empty(1176, 4).t()):
        with pytest.raises(ValueError, match="out must be contiguous"):
            patchify([job], GEOMETRY, out=out)
    with pytest.raises(ValueError, match="dtype must be float32, float16 or bfloat16"):
        patchify([job], GEOMETRY, dtype=torch.float64)
    with pytest.raises(ValueError, match="out must be contiguous .* torch.float16"):
        patchify([job], GEOMETRY, dtype=torch.float16, out=torch.empty(4, 1176))
    for places in (torch.zeros(1), torch.zeros(2).long(), torch.zeros(1).long().to("meta")):
        with pytest.raises(ValueError, match=r"places must be contiguous \(1,\) int32 or int64"):
            patchify([job], GEOMETRY, places=places)
    with pytest.raises(ValueError, match="places must be a permutation of all tokens"):
        patchify([job], GEOMETRY, places=torch.ones(1).long())
    with pytest.raises(RuntimeError, match="backend 'triton' unavailable: tensors are on cpu"):
        patchify([job], GEOMETRY, backend="triton")
    with pytest.raises(ValueError, match="auto, triton, cuda, cpu, reference, got 'gpu'"):
        patchify([job], GEOMETRY, backend="gpu")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("op", ["patchify", "patch_embed"])
def test_too_many_tokens_for_triton_are_refused_before_memory_is_asked_for(
    op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """26 TB of rows, which no machine has."""
    module = importlib.import_module(f"vtts_rt.ops.{op}")
    monkeypatch.setattr(module._OP, "_resolved", {})
    monkeypatch.setattr(dispatch, "interpreted", lambda: True)
    side = MAX_EXTENT // 28 * 28
    job = PatchifyJob(FRAME, FRAME.copy(), WHOLE, (side, side))
    rule = f"{op}: arguments must be what backend 'triton' takes, got '2804855202 tokens"
    with pytest.raises(ValueError, match=rule):
        if op == "patchify":
            patchify([job], GEOMETRY, backend="triton")
        else:
            weight = PatchEmbedWeight(torch.zeros(8, 1176, dtype=torch.bfloat16), GEOMETRY)
            patch_embed([job], weight, backend="triton")


def test_the_native_core_checks_for_itself() -> None:
    """It is callable on its own, and a bad box there would read foreign memory."""
    with pytest.raises(ValueError, match="box must be non-empty and inside"):
        on_isa([one(FRAME, (28, 28), PixelBox(0, 0, 50, 41))], "scalar")
    with pytest.raises(ValueError, match="amx, neon, got sse"):
        on_isa([one(FRAME, (28, 28))], "sse")
    with pytest.raises(ValueError, match="num_threads must be >= 1"):
        on_isa([one(FRAME, (28, 28))], "scalar", num_threads=0)
    out = np.empty((3, 1176), dtype=np.float32)
    with pytest.raises(ValueError, match=r"out must be contiguous \(4, 1176\) float32"):
        item = (FRAME, FRAME, tuple(WHOLE), (28, 28), "fixed")
        _C.patchify([item], out, 14, (0.0,) * 3, (1.0,) * 3)
    for patch_px in (0, 15, 28):
        with pytest.raises(ValueError, match=f"patch_px must be 14 or 16, got {patch_px}"):
            _C.patchify([item], out, patch_px, (0.0,) * 3, (1.0,) * 3)


@pytest.mark.parametrize("isa", ISAS)
def test_any_mean_and_std_divide_exactly(isa: str) -> None:
    """Normalisation values for which a multiplication by the reciprocal would not do."""
    frame = np.arange(784, dtype=np.uint8).reshape(28, 28, 1).repeat(3, axis=2)
    for std in (3.0, 0.1, 255.0, 1e-40):
        out = np.empty((4, 1176), dtype=np.float32)
        item = (frame, frame, (0, 0, 28, 28), (28, 28), "fixed")
        _C.patchify([item], out, 14, (7.7,) * 3, (std,) * 3, isa, 1)
        with np.errstate(over="ignore"):
            expected = (frame[:14, :14, 0].astype(np.float32) - np.float32(7.7)) / np.float32(std)
        assert np.array_equal(out[0, :196].reshape(14, 14), expected), std
