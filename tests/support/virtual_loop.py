"""asyncio in virtual time."""

import asyncio
import selectors


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop that jumps to its next timer instead of waiting."""

    def __init__(self):
        self.now_s = 500.0
        super().__init__(selectors.SelectSelector())
        select = self._selector.select
        self._selector.select = lambda timeout: (self._jump(timeout), select(0))[1]

    def _jump(self, timeout):
        assert timeout is not None, "nothing left to wait for: deadlock"
        self.now_s += max(0, timeout)

    def time(self):
        return self.now_s
