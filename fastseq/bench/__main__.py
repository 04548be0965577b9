"""``python -m fastseq.bench``."""

import sys

from fastseq.bench.command import main

if __name__ == "__main__":
    sys.exit(main())
