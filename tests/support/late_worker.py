"""``flserving serve`` whose replaced workers take LATE_S before they do anything of their own, and
tell when they are forked; every execution takes SLOW_S."""

import os
import sys
import time

from flserving.api import cli, processes
from flserving.serving.engine import InferenceEngine

work, execute, warmup = processes.work, InferenceEngine.execute, InferenceEngine.warmup
started = 0


def late_work(*arguments):
    if started > 2:
        print("forked", flush=True)
        time.sleep(float(os.environ["LATE_S"]))
    work(*arguments)


def slow_execute(self, payloads):
    time.sleep(float(os.environ["SLOW_S"]))
    return execute(self, payloads)


def slow_warmup(self, *sample):
    warmup(self, *sample)
    self.typical_s = float(os.environ["SLOW_S"])  # too long for the event loop
    return self.typical_s


class Counting(processes.Supervisor):
    def _start(self, slot):
        global started
        started += 1
        super()._start(slot)


processes.work, processes.Supervisor = late_work, Counting
InferenceEngine.execute, InferenceEngine.warmup = slow_execute, slow_warmup
sys.exit(cli.main())
