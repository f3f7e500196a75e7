"""The original project's training script under its name: `python train_blip3o_dit.py` is `blip3o-fast train`."""

import sys

from blip3o_fast.cli import main

sys.exit(main(["train", *sys.argv[1:]]))
