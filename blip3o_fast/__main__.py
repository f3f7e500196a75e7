"""`python -m blip3o_fast VERB` is `blip3o-fast VERB`."""

import sys

from blip3o_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
