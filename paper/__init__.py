"""Every table and figure of the paper: `python -m paper table3`; any runs' losses: `python -m paper.figures loss`."""

import sys

if sys.orig_argv[1:2] == ["-m"] and (name := sys.orig_argv[2]).startswith("paper.") and name != "paper.figures":
    print(f"usage: python -m paper WHAT ..; {name} is no command", file=sys.stderr)
    sys.exit(2)
