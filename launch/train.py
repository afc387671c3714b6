"""The script for launchers: torchrun --nproc-per-node 8 launch/train.py --config gpt2_124m.yaml [section.key=value]"""

import sys

from megagpt.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
