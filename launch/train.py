"""The script that launchers start, such as `torchrun --nproc-per-node 8 launch/train.py gpt2_124m.yaml`."""

import sys

from megagpt.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
