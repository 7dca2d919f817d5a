"""`python -m clip_cid` is `clip-cid`."""

import sys

from clip_cid.cli import main

if __name__ == "__main__":
    sys.exit(main())
