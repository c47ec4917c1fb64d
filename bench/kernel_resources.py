"""Registers, spills and shared memory of every GPU kernel, found without a GPU.

    python bench/kernel_resources.py [--triton DIR] [--only NAME] [--output FILE]

Compiles the variants of kernels/*.py that kernel_variants.py lists with the installed Triton, and
with the one in DIR, and all of csrc/cuda/*.cu with nvcc, for sm_80, sm_90 and sm_100. A variant
that spills without a sentence that explains it makes the exit status 1; so does one that does not
compile.

Triton's interpreter must not be on: it shares no process with compilation.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ARCHES = (80, 90, 100)
# The last architecture is named with its features: without, tensor cores of its own are left out.
NVCC_ARCH = {80: "80", 90: "90a", 100: "100a"}
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")

Row = dict[str, Any]


# -- Triton -------------------------------------------------------------------------------------


def triton_kernels() -> list[str]:
    """Names of the files in kernels/."""
    return sorted(path.stem for path in (ROOT / "kernels").glob("[a-z]*.py"))


def compile_variants(names: Sequence[str], first: bool = False) -> Iterator[Row]:
    """The worker: every variant of these kernels for every architecture, with this Triton; of each
    function only the first one if `first`."""
    import triton
    from kernel_variants import OPTIONS, variants
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    for name in names:
        seen = set()
        for variant in variants(name):
            kernel = variant["kernel"]
            if first and kernel.__name__ in seen:
                continue
            seen.add(kernel.__name__)
            constexprs = variant["constexprs"]
            signature = {**variant["signature"], **dict.fromkeys(constexprs, "constexpr")}
            aligned = [
                argument
                for argument, kind in variant["signature"].items()
                if (kind.startswith("*") or kind in ("i32", "i64"))
                and argument not in variant["unaligned"]
            ]
            places = {(kernel.arg_names.index(a),): [["tt.divisibility", 16]] for a in aligned}
            options = {k: variant[k] for k in OPTIONS if k in variant}
            row = {
                "tool": f"triton {triton.__version__}",
                "kernel": name,
                "function": kernel.__name__,
                "variant": variant["name"],
                "explained": variant["spills"],
            }
            for arch in ARCHES:
                source = ASTSource(kernel, signature, constexprs=constexprs, attrs=places)
                target = GPUTarget("cuda", arch, 32)
                try:
                    compiled = triton.compile(source, target=target, options=options)
                except Exception as error:
                    yield {**row, "arch": arch, "error": f"{type(error).__name__}: {error}"[:500]}
                    continue
                loads = re.findall(r"ld\.global\S*", compiled.asm["ptx"])
                yield {
                    **row,
                    "arch": arch,
                    "num_warps": compiled.metadata.num_warps,
                    **_usage(compiled.asm["cubin"]),
                    # Dynamic: what a launch asks for; SHARED of the binary is the static part.
                    "shared_bytes": compiled.metadata.shared,
                    "vector_loads": sum(".v" in load for load in loads),
                    "scalar_loads": sum(".v" not in load for load in loads),
                }


def _usage(cubin: bytes) -> dict[str, int]:
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tools / "cuobjdump"), "--dump-resource-usage", file.name]
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, _, local = map(int, _USAGE.findall(shown)[-1])
    return {"registers": registers, "spill_bytes": max(stack, local)}


def triton_rows(names: Sequence[str], folder: Path | None = None, first: bool = False) -> list[Row]:
    """Rows of these kernels from a process of its own; folder: where another Triton lies; first:
    only the first variant of each function."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(ROOT / "build" / "triton-cache")
    if folder is not None:
        env["PYTHONPATH"] = str(folder)
    command = [sys.executable, __file__, *["--first"] * first, "--worker", *names]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"kernel_resources: {', '.join(names)}: {done.stderr.strip()[-2000:]}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


# -- nvcc ---------------------------------------------------------------------------------------


def cuda_sources() -> list[Path]:
    return sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


def nvcc_rows(source: Path, arch: int) -> list[Row]:
    """Rows of one .cu for one architecture, from what ptxas says."""
    with tempfile.TemporaryDirectory() as folder:
        code = f"-gencode=arch=compute_{NVCC_ARCH[arch]},code=sm_{NVCC_ARCH[arch]}"
        includes = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'include'}"]
        flags = ["-std=c++17", "-O3", code, "-Xptxas", "-v", *includes, "-c", str(source)]
        command = ["nvcc", *flags, "-o", str(Path(folder) / "object.o")]
        done = subprocess.run(command, capture_output=True, text=True)
    base = {"tool": "nvcc", "kernel": source.stem, "variant": "", "arch": arch, "explained": ""}
    if done.returncode:
        return [{**base, "function": source.name, "error": done.stderr.strip()[-500:]}]
    return list(parse_ptxas(done.stderr, base))


def parse_ptxas(text: str, base: Row) -> Iterator[Row]:
    """One row for each entry function that `ptxas -v` reports."""
    entries = re.split(r"Compiling entry function '", text)[1:]
    for entry in entries:
        mangled = entry.split("'", 1)[0]
        spills = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores", entry)
        registers = re.search(r"Used (\d+) registers", entry)
        shared = re.search(r"(\d+) bytes smem", entry)
        assert spills and registers, entry
        yield {
            **base,
            "function": _demangled(mangled),
            "registers": int(registers[1]),
            "spill_bytes": int(spills[2]),
            "shared_bytes": int(shared[1]) if shared else 0,
        }


def _demangled(name: str) -> str:
    if shutil.which("c++filt") is None:
        return name
    done = subprocess.run(["c++filt", name], capture_output=True, text=True, check=True)
    # The template's name and arguments say which; parameters and namespaces are noise.
    plain = re.sub(r"\(anonymous namespace\)::|vtts::|^void ", "", done.stdout.strip())
    return plain[: plain.index("(")] if "(" in plain else plain


# -- all of it ----------------------------------------------------------------------------------


def triton_all(folder: Path | None, jobs: int, only: str | None = None) -> list[Row]:
    """Rows of every kernel with the installed Triton, or with the one in `folder`."""
    names = [name for name in triton_kernels() if only in (None, name)]
    with ThreadPoolExecutor(jobs) as pool:
        parts = list(pool.map(lambda name: triton_rows([name], folder), names))
    return [row for part in parts for row in part]


def nvcc_all(jobs: int, only: str | None = None, arches: Sequence[int] = ARCHES) -> list[Row]:
    """Rows of every .cu; none, with a line on stderr, where there is no nvcc."""
    if shutil.which("nvcc") is None:
        print("nvcc is not on PATH: csrc/cuda is left out", file=sys.stderr)
        return []
    wanted = [path for path in cuda_sources() if only in (None, path.stem)]
    with ThreadPoolExecutor(jobs) as pool:
        parts = [pool.submit(nvcc_rows, path, arch) for path in wanted for arch in arches]
    return [row for part in parts for row in part.result()]


def problems(rows: Sequence[Row]) -> list[str]:
    """A sentence for each variant that does not compile or spills without an explanation."""
    found = []
    for row in rows:
        name = f"{row['kernel']}: {row['function']} [{row['variant']}] sm_{row['arch']}"
        if "error" in row:
            found.append(f"{name} does not compile with {row['tool']}: {row['error']}")
        elif row["spill_bytes"] and not row["explained"]:
            found.append(f"{name} spills {row['spill_bytes']} bytes with {row['tool']}")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--triton", type=Path, help="folder with another Triton to compile with")
    parser.add_argument("--only", help="one kernel, by the name of its file")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--output", type=Path, help="default: bench/results, named by month")
    parser.add_argument("--first", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        for row in compile_variants(args.worker, args.first):
            print(json.dumps(row), flush=True)
        return 0
    folders = [None] if args.triton is None else [None, args.triton]
    rows = [row for folder in folders for row in triton_all(folder, args.jobs, args.only)]
    rows += nvcc_all(args.jobs, args.only)
    now = datetime.now(timezone.utc)
    output = args.output or ROOT / "bench" / "results" / f"kernels_aot_{now:%Y%m}.json"
    report = {"bench": "kernels", "date": now.date().isoformat(), "results": rows}
    output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"{len(rows)} rows: {output}")
    found = problems(rows)
    print(*found, sep="\n", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
