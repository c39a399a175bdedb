"""Every table and figure of the paper as a command: `python -m paper table3`; only the package is a command."""

import sys

if sys.orig_argv[1:2] == ["-m"] and sys.orig_argv[2].startswith("paper."):
    print(f"usage: python -m paper WHAT ..; {sys.orig_argv[2]} is no command", file=sys.stderr)
    sys.exit(2)
