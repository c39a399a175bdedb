"""What ends a run that would otherwise hang."""

import os
import sys
import threading
import time
from typing import Any

from runtime.distributed import RankLost


class Watchdog(threading.Thread):
    """Ends the process when `beat` was not called for so many seconds: a rank that died or hangs would keep the others for ever.

    It is a thread of its own, since the main one is then inside a collective or waits for the device.
    """

    def __init__(self, seconds: float, rank: int, last_good: Any) -> None:
        super().__init__(daemon=True)
        self.seconds, self.rank, self.last_good = seconds, rank, last_good
        self.done = threading.Event()
        self.beat("the start")

    def beat(self, what: str) -> None:
        self.what, self.waited = what, 0.0

    def run(self) -> None:
        often, last = min(1.0, self.seconds / 10), time.monotonic()
        while not self.done.wait(often):
            last, passed = time.monotonic(), time.monotonic() - last
            self.waited += min(passed, 2 * often)  # a process that was stopped itself (Ctrl-Z) has not waited
            if self.waited > self.seconds:
                print(
                    f"train.py: error: {self.what}: rank {self.rank} has waited for {self.seconds:g} s (train.timeout): another rank, a device or "
                    f"a disk hangs. The same command goes on. {self.last_good()}",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(RankLost.code)
