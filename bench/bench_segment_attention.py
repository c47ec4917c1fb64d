"""segment_attention: every backend against torch's attention; `--help` lists the flags."""

import sys

from vtts_rt.bench import main

if __name__ == "__main__":
    sys.exit(main(["ops", "--op", "segment_attention", *sys.argv[1:]]))
