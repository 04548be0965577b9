"""``python -m fastseq``."""

import sys

from fastseq.cli import main

if __name__ == "__main__":
    sys.exit(main())
