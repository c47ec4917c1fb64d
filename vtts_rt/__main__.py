"""`python -m vtts_rt`: where the C interface is, otherwise the same as `vtts-rt`."""

from __future__ import annotations

import sys
from collections.abc import Callable

from vtts_rt import __version__, sdk

FLAGS: dict[str, Callable[[], str]] = {
    "--includes": lambda: f"-I{sdk.get_include_dir()}",
    "--libs": lambda: f"-L{sdk.get_lib_dir()} -lvtts -Wl,-rpath,{sdk.get_lib_dir()}",
    "--cmakedir": sdk.get_cmake_dir,
    "--pkgconfigdir": sdk.get_pkgconfig_dir,
    "--version": lambda: __version__,
}


def main(arguments: list[str]) -> int:
    """Print what each flag asks for, a line each; any other command line goes to `vtts-rt`."""
    if not arguments or not set(arguments) <= set(FLAGS):
        from vtts_rt.cli import main as command_line

        return command_line(arguments)
    try:
        for flag in arguments:
            print(FLAGS[flag]())
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
