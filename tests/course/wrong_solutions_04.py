"""Notebook 04: the simulator's loop and a batcher behind coroutines; plausible wrong solutions.

Registers into ``wrong_solutions``, which holds those of the dynamic batcher.
"""

from wrong_solutions import WRONG, wrong

_TOGETHER = (
    "        while events and events[0][0] == now_s:\n            number = heappop(events)[1]\n"
)
_DONE = "done_s = now_s + service_s(len(batch))"
_SET = "start_s[number], end_s[number] = now_s, done_s"
_START = "        while batch := batcher.next_batch(idle):\n"
WRONG["simulate"] = {
    "starts at arrival": wrong(
        "simulate",
        "each started at its arrival, although the only worker",
        (
            _SET,
            "start_s[number], end_s[number] = arrival_s[number], arrival_s[number] + done_s - now_s",
        ),
    ),
    "waits instead of times": wrong(
        "simulate",
        "start_s is a time, not a duration",
        (_SET, "start_s[number], end_s[number] = now_s - arrival_s[number], done_s"),
    ),
    "ends at the start": wrong(
        "simulate",
        "each ended as it started",
        (_SET, "start_s[number], end_s[number] = now_s, now_s"),
    ),
    "durations": wrong(
        "simulate",
        "durations; it is the time of the end",
        (_SET, "start_s[number], end_s[number] = now_s, done_s - now_s"),
    ),
    "starts when done": wrong(
        "simulate",
        "that is end_s",
        (_SET, "start_s[number], end_s[number] = done_s, done_s + done_s - now_s"),
    ),
    "nobody gets a time": wrong("simulate", "keep the time of the event", (_SET, "pass")),
    "the end is no event": wrong(
        "simulate",
        "that a batch is done is an event, too",
        (
            f"            {_DONE}\n            heappush(events, (done_s, -1))\n",
            f"            {_DONE}\n            free_s = done_s\n",
        ),
        ("    idle = workers\n", "    idle, free_s = workers, 0.0\n"),
        (_TOGETHER, f"        idle = int(now_s >= free_s)\n{_TOGETHER}"),
        (
            "            if number < 0:\n                idle += 1\n            else:\n    ",
            "            if True:\n    ",
        ),
    ),
    "one row's time": wrong(
        "simulate", "a batch of 4 takes service_s\\(4\\)", (_DONE, "done_s = now_s + service_s(1)")
    ),
    "asks for each row": wrong(
        "simulate",
        "it may be random, ask once a batch",
        (_SET, "start_s[number], end_s[number] = now_s, now_s + service_s(len(batch))"),
    ),
    "rows one after the other": wrong(
        "simulate",
        "all of a batch end together",
        (
            _SET,
            "start_s[number], end_s[number] = now_s, now_s + (done_s - now_s) * (batch.index((number, None)) + 1)",
        ),
    ),
    "event by event": wrong(
        "simulate",
        "let all events of a moment happen before",
        (_TOGETHER, "        if True:\n            number = heappop(events)[1]\n"),
    ),
    "more workers than there are": wrong(
        "simulate", "the only worker was busy", ("            idle -= 1\n", "")
    ),
    "one worker only": wrong(
        "simulate", "only one worker ever works", ("idle = workers", "idle = 1")
    ),
    "a worker never comes back": wrong(
        "simulate", r"you have \[0.0, 0.0, 0.0, 0.0\]", ("idle += 1", "idle += 0")
    ),
    "one batch for each event": wrong(
        "simulate",
        "ask the batcher again while a worker is idle",
        (_START, "        for batch in [b for b in [batcher.next_batch(idle)] if b]:\n"),
    ),
    "the order of arrival": wrong(
        "simulate",
        "not the order of arrival",
        ("    idle = workers\n", "    idle, turn = workers, 0\n"),
        (
            f"                {_SET}",
            "                start_s[turn], end_s[turn], turn = now_s, done_s, turn + 1",
        ),
    ),
    "never ends": wrong(
        "simulate",
        "your loop never ends",
        (_START, "        while True:\n            batch = batcher.next_batch(idle)\n"),
    ),
    "a list of both": wrong(
        "simulate",
        "return two arrays",
        ("return start_s, end_s", "return np.concatenate([start_s, end_s])"),
    ),
}

_FUTURE = "        future = asyncio.get_running_loop().create_future()\n"
_TASK = "        if self.task is None or self.task.done():\n"
_BATCH = "[one for one in self.batcher.next_batch(1) if not one[0].done()]"
_THREAD = "await asyncio.to_thread(run, batch, self.model) if batch else {}"
_HOLD = """\
            with suppress(TimeoutError):
                async with asyncio.timeout(self.max_wait_s):
                    while len(self.batcher.queue) < self.batcher.max_batch_size:
                        self.arrived.clear()
                        await self.arrived.wait()
"""
_SETTLE = "settle = future.set_exception if failed else future.set_result"
WRONG["async-batcher"] = {
    "the future itself": wrong(
        "async-batcher",
        "returned a future: await it",
        ("        return await future\n", "        return future\n"),
    ),
    "no batch task": wrong(
        "async-batcher", "nobody started a batch task", (_TASK, "        if False:\n")
    ),
    "nobody sets the result": wrong(
        "async-batcher",
        "nobody set its future's result",
        ("                    settle(answer)\n", ""),
    ),
    "a task once and for all": wrong(
        "async-batcher", "its batch task has ended, start another", (" or self.task.done():", ":")
    ),
    "a task for each caller": wrong(
        "async-batcher", "one batch task serves all", (_TASK, "        if True:\n")
    ),
    "in the event loop's thread": wrong(
        "async-batcher",
        "the model ran in the thread of the event loop",
        (_THREAD, "run(batch, self.model) if batch else {}"),
    ),
    "row by row": wrong(
        "async-batcher",
        "callers of the same moment share a batch",
        (_BATCH, "[self.batcher.queue.pop(0)]"),
    ),
    "one batch only": wrong(
        "async-batcher",
        "only 4 rows ever ran",
        ("while self.batcher.queue:", "if self.batcher.queue:"),
    ),
    "never waits": wrong(
        "async-batcher",
        "the batch did not wait for others",
        (_HOLD, "            await asyncio.sleep(0)\n"),
    ),
    "always waits to the end": wrong(
        "async-batcher",
        "who waits for more than a full batch",
        (_HOLD, "            await asyncio.sleep(self.max_wait_s)\n"),
    ),
    "waits for a full batch": wrong(
        "async-batcher",
        "waited a minute for an answer",
        ("asyncio.timeout(self.max_wait_s)", "asyncio.timeout(None)"),
    ),
    "milliseconds": wrong(
        "async-batcher",
        "is in seconds",
        ("asyncio.timeout(self.max_wait_s)", "asyncio.timeout(self.max_wait_s * 1e3)"),
    ),
    "each caller begins the wait anew": wrong(
        "async-batcher",
        "must not begin it anew",
        (
            _HOLD,
            """\
            with suppress(TimeoutError):
                while len(self.batcher.queue) < self.batcher.max_batch_size:
                    self.arrived.clear()
                    await asyncio.wait_for(self.arrived.wait(), self.max_wait_s)
""",
        ),
    ),
    "a minimum wait": wrong(
        "async-batcher",
        "although the model was idle",
        ("asyncio.timeout(self.max_wait_s)", "asyncio.timeout(max(self.max_wait_s, 0.01))"),
    ),
    "asks in a loop": wrong(
        "async-batcher",
        "never rests",
        (
            _HOLD,
            """\
            while len(self.batcher.queue) < self.batcher.max_batch_size:
                await asyncio.sleep(0)
""",
        ),
    ),
    "spins without await": wrong(
        "async-batcher",
        "your loop never ends",
        (
            _HOLD,
            "            while len(self.batcher.queue) < self.batcher.max_batch_size:\n                pass\n",
        ),
    ),
    "an error is an answer": wrong(
        "async-batcher",
        "an error is an error, not an answer",
        (_SETTLE, "settle = future.set_result"),
    ),
    "an error for all": wrong(
        "async-batcher",
        "the others have answers",
        (
            "            for future, answer in answers.items():\n",
            "            wrong = [one for one in answers.values() if isinstance(one, Exception)]\n"
            "            answers = dict.fromkeys(answers, wrong[0]) if wrong else answers\n"
            "            for future, answer in answers.items():\n",
        ),
    ),
    "an error gets no answer": wrong(
        "async-batcher",
        "the caller of the bad row waits for ever",
        (_SETTLE, f"if failed:\n                        continue\n                    {_SETTLE}"),
    ),
    "a cancelled future is set": wrong(
        "async-batcher",
        "InvalidStateError.*its caller had given up",
        ("if not future.done():", "if True:"),
    ),
    "runs for nobody": wrong(
        "async-batcher", "work for nobody", (_BATCH, "self.batcher.next_batch(1)")
    ),
    "runs an empty batch": wrong("async-batcher", "an empty batch", (" if batch else {}", "")),
    "a misspelt name": wrong(
        "async-batcher",
        "AttributeError: .*'submitt'",
        ("self.batcher.submit(", "self.batcher.submitt("),
    ),
    "no future": wrong(
        "async-batcher",
        "the batch task died of AttributeError",
        (_FUTURE, "        future = asyncio.Event()\n"),
        ("await future", "await future.wait()"),
    ),
}
