"""`python -m mtl_dist` and `accelerate launch -m mtl_dist`."""

import sys

from mtl_dist.cli import main

if __name__ == "__main__":
    sys.exit(main())
