"""python -m nybble"""

import sys

from nybble.cli import main

if __name__ == "__main__":
    sys.exit(main())
