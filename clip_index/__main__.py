"""`python -m clip_index` is the same as `clip-index`."""

import sys

from clip_index.cli import main

if __name__ == "__main__":
    sys.exit(main())
