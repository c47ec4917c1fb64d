"""patch_embed: every backend against patchify and a product; `--help` lists the flags."""

import sys

from vtts_rt.bench import main

if __name__ == "__main__":
    sys.exit(main(["ops", "--op", "patch_embed", *sys.argv[1:]]))
