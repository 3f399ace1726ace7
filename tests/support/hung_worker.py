"""``flserving serve`` that notices sooner when a worker hangs; the first one that replaces another
never starts."""

import sys
import time

from flserving.api import cli, processes

work = processes.work
started = 0


def stuck_work(*arguments):
    if started == 3:
        time.sleep(1000)
    work(*arguments)


class Hasty(processes.Supervisor):
    def _start(self, slot):
        global started
        started += 1
        # the one that starts well may take its time
        processes.START_S = 5.0 if started == 3 else 60.0
        super()._start(slot)

    def _watch(self, signals):
        processes.HUNG_S = 3.0
        return super()._watch(signals)


processes.work, processes.Supervisor = stuck_work, Hasty
sys.exit(cli.main())
