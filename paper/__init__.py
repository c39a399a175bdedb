"""Every table and figure of the paper as a command: `python -m paper table3`."""
