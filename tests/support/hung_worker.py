"""``flserving serve`` that notices sooner when a worker hangs; the first one that replaces another never starts."""

import sys
import time

from flserving.api import cli, supervisor

work = supervisor.work
started = 0


def stuck_work(*arguments):
    if started == 3:
        time.sleep(1000)
    work(*arguments)


class Hasty(supervisor.Supervisor):
    def _start(self, slot):
        global started
        started += 1
        super()._start(slot)

    def _look(self, signals):
        supervisor.HUNG_S = 3.0
        supervisor.START_S = 5.0
        return super()._look(signals)


supervisor.work, supervisor.Supervisor = stuck_work, Hasty
sys.exit(cli.main())
