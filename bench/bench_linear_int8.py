"""linear_int8: every backend against torch's operators; `--help` lists the flags."""

import sys

from vtts_rt.bench import main

if __name__ == "__main__":
    sys.exit(main(["ops", "--op", "linear_int8", *sys.argv[1:]]))
