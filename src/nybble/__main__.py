"""python -m nybble"""

import sys

from nybble.cli.main import main

if __name__ == "__main__":
    sys.argv[0] = "nybble"  # the command that a run remembers
    sys.exit(main())
