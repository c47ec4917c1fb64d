"""libvtts.so: what it computes, what it exports, and that its headers are C."""

from __future__ import annotations

import ctypes as c
import itertools
import re
import shutil
import subprocess
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import vtts_abi
from utils import QWEN3_VL, UNEVEN
from vtts_abi import Frame

import vtts_rt
from vtts_rt.models.qwen2_5_vl import GEOMETRY
from vtts_rt.ops.patch_jobs import mean_and_std
from vtts_rt.ops.patchify import PatchifyJob, patchify_ref
from vtts_rt.types import RESIZE_KERNELS, Geometry, PixelBox, ResizeKernel

ROOT = Path(__file__).resolve().parents[2]
HEADERS = ROOT / "csrc" / "include"
pytestmark = pytest.mark.usefixtures("built")


@pytest.fixture(scope="module")
def built() -> None:
    vtts_abi.library()


def frames(num: int, height: int, width: int) -> list[np.ndarray]:
    """Frames whose rows end in bytes of padding."""
    generator = np.random.default_rng(num)
    wide = generator.integers(0, 256, (num, height, width + 3, 3), dtype=np.uint8)
    return [frame[:, :width] for frame in wide]


BOXES = [((0, 0, 91, 70), (2, 3)), ((3, 5, 80, 61), (1, 2)), ((1, 2, 29, 30), (1, 1))]


def both(
    *kernels: ResizeKernel, geometry: Geometry = GEOMETRY
) -> tuple[list[np.ndarray], list[Any], torch.Tensor]:
    """(frames to keep, jobs of the library, the reference's rows)."""
    pixels = frames(4, 70, 91)
    pairs = [(pixels[0], pixels[1]), (pixels[2], pixels[2]), (pixels[3][::-1], pixels[0])]
    native, jobs = [], []
    for pair, (box, tokens), resize in zip(pairs, BOXES, kernels or ("fixed",) * 3, strict=True):
        hw = (tokens[0] * geometry.token_px, tokens[1] * geometry.token_px)
        native.append(vtts_abi.job(pair, box, hw))
        native[-1].resize = RESIZE_KERNELS.index(resize)
        jobs.append(PatchifyJob(*pair, PixelBox(*box), hw, resize))
    return pixels, native, patchify_ref(jobs, geometry)


@pytest.mark.parametrize("kernels", itertools.permutations(RESIZE_KERNELS))
def test_patchify_has_the_reference_bits(kernels: tuple[ResizeKernel, ...]) -> None:
    _keep, native, expected = both(*kernels)
    for num_threads in (1, 3):
        rows = vtts_abi.patchify(native, num_threads=num_threads)
        assert np.array_equal(rows, expected.numpy())
    assert np.array_equal(vtts_abi.patchify(native, isa=1), rows)


def test_patches_of_16_px_with_any_mean_and_std() -> None:
    _keep, native, expected = both(*RESIZE_KERNELS, geometry=UNEVEN)
    mean, std = map(tuple, mean_and_std(UNEVEN, torch.device("cpu")).tolist())
    rows = vtts_abi.patchify(native, patch_px=16, mean=mean, std=std)
    assert rows.shape == (36, 1536) and np.array_equal(rows, expected.numpy())


@pytest.mark.parametrize("geometry", [GEOMETRY, UNEVEN], ids=["14 px", "16 px"])
def test_patch_embed_is_the_product_of_the_rows(geometry: Geometry) -> None:
    _keep, native, rows = both(geometry=geometry)
    weight = torch.randn(24, geometry.row_size)
    bias = torch.randn(24)
    out = torch.full((len(rows), 24), float("nan"))
    weights = vtts_abi.default("patch_embed_weights")
    weights.weight, weights.bias, weights.num_outputs = weight.data_ptr(), bias.data_ptr(), 24
    address = c.c_void_p(out.data_ptr())
    count = c.c_int64(len(native))
    mean, std = map(tuple, mean_and_std(geometry, torch.device("cpu")).tolist())
    options = vtts_abi.options(patch_px=geometry.patch_px, mean=mean, std=std)
    how = c.byref(options), c.byref(weights)
    vtts_abi.call("patch_embed_cpu", vtts_abi.jobs(native), count, *how, address)
    exact = rows.double() @ weight.double().T + bias.double()
    eager = rows @ weight.T + bias
    worst = (eager.double() - exact).abs().max()
    assert (out.double() - exact).abs().max() <= 2 * worst + exact.abs().max() * 2**-23


@pytest.mark.parametrize("geometry", [GEOMETRY, QWEN3_VL], ids=["14 px", "16 px"])
def test_folding_moves_the_normalisation_into_the_weight(geometry: Geometry) -> None:
    _keep, native, _ = both(geometry=geometry)
    both_values = mean_and_std(geometry, torch.device("cpu"))
    mean, std = map(tuple, both_values.tolist())
    changed = {"patch_px": geometry.patch_px, "mean": mean, "std": std}
    options, row_size = vtts_abi.options(**changed), geometry.row_size
    pixels = torch.from_numpy(vtts_abi.patchify(native, **changed)).double()
    mean, std = both_values.double().repeat_interleave(row_size // 3, dim=1)
    whole = (pixels * std + mean).round()  # 0..255
    weight, bias = torch.randn(8, row_size), torch.randn(8)
    weights = vtts_abi.default("patch_embed_weights")
    weights.weight, weights.bias, weights.num_outputs = weight.data_ptr(), bias.data_ptr(), 8
    for number, dtype in enumerate((torch.float32, torch.float16, torch.bfloat16)):
        folded, folded_bias = torch.zeros(8, row_size, dtype=dtype), torch.full((8,), float("nan"))
        targets = c.c_void_p(folded.data_ptr()), c.c_void_p(folded_bias.data_ptr())
        vtts_abi.call("patch_embed_fold", c.byref(weights), c.byref(options), number, *targets)
        assert torch.equal(folded, (weight / std.float()).to(dtype))
        out = whole @ folded.double().T + folded_bias.double()
        rounded = pixels @ (folded.double() * std).T + bias.double()
        assert (out - rounded).abs().max() <= 2e-3


def test_errors_belong_to_their_thread() -> None:
    lib = vtts_abi.library()
    with pytest.raises(vtts_abi.Refused, match="num_jobs must be in"):
        vtts_abi.call("patchify_num_rows", None, c.c_int64(-1), None, c.byref(c.c_int64()))
    seen = []
    thread = threading.Thread(target=lambda: seen.append(lib.vtts_last_error_message()))
    thread.start()
    thread.join()
    assert seen == [b""]
    assert b"num_jobs" in lib.vtts_last_error_message()


def test_versions() -> None:
    lib = vtts_abi.library()
    header = (HEADERS / "vtts" / "base.h").read_text()
    major, minor = (
        int(re.findall(f"define VTTS_ABI_{part} ([0-9]+)", header)[0])
        for part in ("MAJOR", "MINOR")
    )
    assert lib.vtts_abi_version() == major << 16 | minor
    assert lib.vtts_version().decode() == vtts_rt.__version__
    assert f"VTTS_{major} " in (ROOT / "csrc" / "libvtts.map").read_text()
    assert lib.vtts_status_name(1) == b"VTTS_ERROR_INVALID_ARGUMENT"
    assert lib.vtts_status_name(-7) == b"unknown"


def test_structures_have_the_sizes_of_the_header() -> None:
    for name, struct in vtts_abi.DEFAULTS.items():
        assert vtts_abi.default(name).struct_size == c.sizeof(struct), name


def declared() -> set[str]:
    text = "".join(path.read_text() for path in (HEADERS / "vtts").glob("*.h"))
    return set(re.findall(r"VTTS_API[^;(]*?\b(vtts_\w+)\(", text))


def test_exactly_the_declared_functions_are_exported() -> None:
    if shutil.which("nm") is None:
        pytest.skip("no nm")
    command = ["nm", "-D", "--defined-only", vtts_rt.get_library()]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")
    exported = {line.split()[2].split("@")[0] for line in lines if " T " in line}
    others = [line for line in lines if line and " T " not in line and " A " not in line]
    assert exported == declared() and len(exported) > 15
    assert not others, others


def test_the_soname_is_that_of_the_installed_file() -> None:
    if shutil.which("readelf") is None:
        pytest.skip("no readelf")
    command = ["readelf", "-d", vtts_rt.get_library()]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (soname,) = re.findall(r"SONAME.*\[(.*)\]", shown)
    assert (Path(vtts_rt.get_lib_dir()) / soname).is_file()
    assert "python" not in shown


@pytest.mark.parametrize(
    ("compiler", "flags"),
    [
        ("cc", ["-x", "c", "-std=c99", "-pedantic", "-Wall", "-Wextra", "-Werror"]),
        ("c++", ["-x", "c++", "-std=c++11", "-pedantic", "-Wall", "-Wextra", "-Werror"]),
    ],
)
def test_every_header_compiles_alone(compiler: str, flags: list[str], tmp_path: Path) -> None:
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler}")
    for header in sorted((HEADERS / "vtts").glob("*.h")):
        source = tmp_path / f"{header.stem}.c"
        source.write_text(f'#include "vtts/{header.name}"\n#include "vtts/vtts.h"\n')
        command = [compiler, *flags, f"-I{HEADERS}", "-fsyntax-only", str(source)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_installed_headers_are_those_of_the_sources() -> None:
    installed = Path(vtts_rt.get_include_dir()) / "vtts"
    for header in (HEADERS / "vtts").glob("*.h"):
        assert (installed / header.name).read_text() == header.read_text()


def test_without_cuda_the_gpu_functions_say_so() -> None:
    if vtts_abi.library().vtts_has_cuda():
        pytest.skip("built with CUDA")
    _keep, native, _ = both()
    found = c.c_int64(-1)
    arguments = vtts_abi.jobs(native), c.c_int64(len(native)), None
    with pytest.raises(vtts_abi.Refused, match="built without CUDA") as caught:
        vtts_abi.call("patchify_cuda_workspace_bytes", *arguments, c.byref(found))
    assert caught.value.status == vtts_abi.UNSUPPORTED and found.value == -1
    launch = vtts_abi.default("cuda_launch")
    launch.workspace = 1 << 20
    out = c.c_void_p(1 << 20)
    with pytest.raises(vtts_abi.Refused, match="built without CUDA"):
        vtts_abi.call("patchify_cuda", *arguments, c.byref(launch), out)
    folded = vtts_abi.default("patch_embed_folded")
    folded.weight = folded.bias = 1 << 20
    folded.num_outputs = 12
    with pytest.raises(vtts_abi.Refused, match="folded.num_outputs must be a multiple of 8"):
        vtts_abi.call("patch_embed_cuda", *arguments, c.byref(folded), c.byref(launch), out)


# -- DLPack -----------------------------------------------------------------------------------


def test_the_original_header_may_be_used(tmp_path: Path) -> None:
    """torch's copy of dlpack.h, included first, has the layout that ours declares."""
    original = Path(torch.__file__).parent / "include" / "ATen" / "dlpack.h"
    if shutil.which("c++") is None or not original.exists():
        pytest.skip("no c++ or no dlpack.h")
    fields = [f"offsetof(DLTensor, {name})" for name in ("device", "ndim", "dtype", "shape")]
    fields += [
        f"offsetof(DLManagedTensorVersioned, {n})" for n in ("deleter", "flags", "dl_tensor")
    ]
    fields += ["offsetof(DLTensor, byte_offset)", "sizeof(DLManagedTensorVersioned)", "kDLBfloat"]
    printed = []
    for name, first in (("ours", ""), ("theirs", f'#include "{original}"\n')):
        source, program = tmp_path / f"{name}.cpp", tmp_path / name
        prints = "".join(f'std::printf("%d ", (int)({field}));' for field in fields)
        head = f"{first}#include <vtts/vtts.h>\n#include <cstddef>\n#include <cstdio>\n"
        source.write_text(f"{head}int main() {{ {prints} }}\n")
        subprocess.run(["c++", f"-I{HEADERS}", str(source), "-o", str(program)], check=True)
        printed.append(subprocess.run([str(program)], capture_output=True, check=True).stdout)
    assert printed[0] == printed[1] and len(printed[0].split()) == len(fields)


class DLTensor(c.Structure):
    _fields_ = [
        ("data", c.c_void_p),
        ("device_type", c.c_int32),
        ("device_id", c.c_int32),
        ("ndim", c.c_int32),
        ("code", c.c_uint8),
        ("bits", c.c_uint8),
        ("lanes", c.c_uint16),
        ("shape", c.POINTER(c.c_int64)),
        ("strides", c.POINTER(c.c_int64)),
        ("byte_offset", c.c_uint64),
    ]


class Managed(c.Structure):
    _fields_ = [
        ("version", c.c_uint32 * 2),
        ("manager_ctx", c.c_void_p),
        ("deleter", c.c_void_p),
        ("flags", c.c_uint64),
        ("dl_tensor", DLTensor),
    ]


def dl_tensor(tensor: torch.Tensor) -> tuple[object, Managed]:
    """(what keeps it alive, the structure that torch exports)."""
    capsule = tensor.__dlpack__(max_version=(1, 0))
    get = c.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = c.c_void_p, [c.py_object, c.c_char_p]
    return capsule, Managed.from_address(get(capsule, b"dltensor_versioned"))


def test_frames_come_in_through_dlpack() -> None:
    pixels = torch.from_numpy(frames(1, 70, 91)[0])
    keep, managed = dl_tensor(pixels[2:, 1:])
    frame, device = Frame(), c.c_int32(-1)
    vtts_abi.call("frame_from_dlpack", c.byref(managed.dl_tensor), c.byref(frame), c.byref(device))
    assert (frame.height, frame.width, device.value) == (68, 90, 0)
    assert frame.data == pixels[2:, 1:].data_ptr() and frame.row_stride_bytes == 94 * 3
    assert keep is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ndim": 2}, "tensor.ndim must be 3, got 2"),
        ({"bits": 16}, "tensor.dtype must be uint8"),
        ({"lanes": 3}, "tensor.dtype.lanes must be 1"),
        ({"device_type": 10}, "must be on a CPU or a CUDA device, got device type 10"),
        ({"data": None}, "tensor.data must be a pointer"),
        ({"shape": None}, "tensor.shape must be a pointer"),
    ],
)
def test_tensors_that_are_no_frames(change: dict[str, Any], message: str) -> None:
    keep, managed = dl_tensor(torch.zeros(28, 28, 3, dtype=torch.uint8))
    saved = {name: getattr(managed.dl_tensor, name) for name in change}
    for name, value in change.items():
        setattr(managed.dl_tensor, name, value)
    frame = Frame(1, 2, 3, 4)
    try:
        with pytest.raises(vtts_abi.Refused, match=re.escape(message)):
            vtts_abi.call("frame_from_dlpack", c.byref(managed.dl_tensor), c.byref(frame), None)
    finally:
        for name, value in saved.items():
            setattr(managed.dl_tensor, name, value)
    assert (frame.data, frame.width) == (1, 4) and keep is not None


def test_planar_pixels_are_refused() -> None:
    keep, managed = dl_tensor(torch.zeros(3, 28, 28, dtype=torch.uint8).permute(1, 2, 0))
    with pytest.raises(vtts_abi.Refused, match="packed pixels"):
        vtts_abi.call("frame_from_dlpack", c.byref(managed.dl_tensor), c.byref(Frame()), None)
    assert keep is not None


def test_rows_go_into_a_tensor_of_the_caller() -> None:
    data, dtype = c.c_void_p(), c.c_int32(-1)
    for number, kind in enumerate((torch.float32, torch.float16, torch.bfloat16)):
        target = torch.zeros(8, 1176, dtype=kind)
        keep, managed = dl_tensor(target)
        shape = c.c_int64(8), c.c_int64(1176)
        arguments = c.byref(managed.dl_tensor), *shape, 0, c.byref(data), c.byref(dtype)
        vtts_abi.call("output_from_dlpack", *arguments)
        assert (data.value, dtype.value) == (target.data_ptr(), number) and keep is not None
        for rule, wrong in (
            ("(9, 1176)", (c.c_int64(9), c.c_int64(1176), 0)),
            ("on a CUDA device", (*shape, 1)),
        ):
            with pytest.raises(vtts_abi.Refused, match=re.escape(rule)):
                vtts_abi.call(
                    "output_from_dlpack", arguments[0], *wrong, c.byref(data), c.byref(dtype)
                )
    keep, managed = dl_tensor(torch.zeros(8, 2352)[:, ::2])
    with pytest.raises(vtts_abi.Refused, match="contiguous"):
        vtts_abi.call(
            "output_from_dlpack", c.byref(managed.dl_tensor), *shape, 0, c.byref(data),
            c.byref(dtype),
        )  # fmt: skip


def test_rows_come_out_as_a_tensor_of_the_library() -> None:
    _keep, native, expected = both()
    found = c.POINTER(Managed)()
    count = c.c_int64(len(native))
    vtts_abi.call("patchify_cpu_dlpack", vtts_abi.jobs(native), count, None, c.byref(found))
    assert tuple(found.contents.version) == (1, 0)
    make = c.pythonapi.PyCapsule_New
    make.restype, make.argtypes = c.py_object, [c.c_void_p, c.c_char_p, c.c_void_p]
    capsule = make(c.cast(found, c.c_void_p), b"dltensor_versioned", None)
    rows = torch.utils.dlpack.from_dlpack(capsule)  # torch calls the deleter when it is freed
    assert rows.dtype == torch.float32 and torch.equal(rows, expected)
