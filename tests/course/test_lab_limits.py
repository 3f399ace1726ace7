"""Whatever a student's code does in a check, the student reads a sentence: it hangs, prints, exits,
is no function."""

import re
import signal
import subprocess
import sys
import threading
import time

import pytest

from flserving.lab.checks import limits
from flserving.lab.checks.asking import ask
from flserving.lab.checks.limits import TooLongError, elsewhere, few_lines, time_limit
from flserving.lab.checks.parts import CheckError, Part, judge
from flserving.lab.workbook import answers

LOOP = "def solve():\n    while True:\n        try:\n            while True: pass\n        except Exception: pass\n"


@pytest.fixture
def exercise(request):
    return request.node.name


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(limits, "LIMIT_S", 0.2)


def of_a_cell(source, tmp_path):
    """The function ``solve`` as a notebook's cell defines it."""
    cell = tmp_path / "cell.py"
    cell.write_text(source)
    names = {"__name__": "__main__", "time": time, "threading": threading}
    exec(compile(source, str(cell), "exec"), names)
    return names["solve"]


def told(exercise, solution, check=lambda solve: solve(), name="runs"):
    with pytest.raises(CheckError) as caught:
        judge(exercise, solution, Part(name, check), Part("is right", check))
    return caught.value


@pytest.mark.parametrize("where", [lambda solve: solve(), elsewhere], ids=["here", "in a thread"])
def test_a_loop_that_never_ends_is_stopped_and_its_line_told(where, exercise, short, tmp_path):
    before, timer = signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)
    error = told(exercise, of_a_cell(LOOP, tmp_path), where)
    assert "your code was stopped after 0.2 s: it loops or waits for ever" in str(error)
    assert "of your cell: while True: pass" in "\n".join(error._render_traceback_())
    assert error.marks.startswith("0 of 2 parts")
    assert answers.recorded("checks")[exercise]["right"] == 0
    assert signal.getsignal(signal.SIGALRM) is before
    after = signal.getitimer(signal.ITIMER_REAL)
    assert after[1] == timer[1] and bool(after[0]) == bool(timer[0]), (
        "a timer of somebody else goes on"
    )
    assert not any(thread.name.endswith("(run)") for thread in threading.enumerate()), (
        "the loop has ended too"
    )


def test_code_that_waits_for_ever_does_not_hold_the_kernel(exercise, short, tmp_path):
    waits = of_a_cell("def solve():\n    threading.Event().wait()\n", tmp_path)
    assert "waits for ever" in str(told(exercise, waits))
    assert "waits for ever" in str(told(exercise, waits, elsewhere))
    assert all(thread.daemon for thread in threading.enumerate() if thread.name.endswith("(run)"))


TRACED_AFTER_A_WAIT = """
import sys, threading
from flserving.lab.checks.limits import TooLongError, elsewhere, time_limit
try:
    with time_limit(0.1):
        elsewhere(threading.Event().wait)
except TooLongError:
    print("stopped", threading.active_count())
lines = []
def trace(frame, event, argument):
    lines.append(event)
    return trace
sys.settrace(trace)
(lambda: 1)()
sys.settrace(None)
print(lines)
"""


def test_a_thread_that_waits_for_ever_leaves_no_pending_error_to_the_others():
    """With one, the first call under a tracer (a debugger, coverage, a check that counts) never
    begins in 3.11."""
    python = [sys.executable, "-c", TRACED_AFTER_A_WAIT]
    ended = subprocess.run(python, capture_output=True, text=True, timeout=300, check=True)
    assert ended.stdout.splitlines() == ["stopped 2", "['call', 'line', 'return']"]


def test_the_limit_leaves_threads_alone_that_were_there_before():
    go_on, ended = threading.Event(), threading.Event()

    def bystander():
        while not go_on.is_set():
            time.sleep(1e-3)
        ended.set()

    threading.Thread(target=bystander, daemon=True).start()
    with pytest.raises(TooLongError), time_limit(0.05):
        time.sleep(5)
    go_on.set()
    assert ended.wait(5)


def test_outside_the_main_thread_nothing_is_limited_and_nothing_fails():
    def run():
        with time_limit(0.01):
            time.sleep(0.05)
        return "done"

    assert elsewhere(run) == "done"


def test_elsewhere_hands_on_what_a_function_raises():
    with pytest.raises(ZeroDivisionError):
        elsewhere(lambda: 1 / 0)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("raise NotImplementedError", "raised NotImplementedError: that line waits for code"),
        ("raise NotImplementedError('todo')", "raised NotImplementedError todo"),
        ("raise SystemExit(3)", "return instead"),
        ("assert 1 == 2", "runs: your code raised AssertionError$"),
        ("assert 1 == 2, 'mine'", "runs: your code raised AssertionError mine$"),
    ],
)
def test_what_a_student_raises_is_a_sentence_with_its_line(line, sentence, exercise, tmp_path):
    error = told(exercise, of_a_cell(f"def solve():\n    {line}\n", tmp_path))
    assert re.search(sentence, str(error))
    assert f"It came from line 2 of your cell: {line}" in error._render_traceback_()


@pytest.mark.parametrize("solution", [None, "text", 5, [], {}])
def test_what_is_no_function_is_told_so(solution, exercise):
    error = told(exercise, solution, lambda solve: ask("solve()", solve))
    assert f"got {solution!r}, no function and no class" in str(error)


def test_of_much_print_the_beginning_is_shown(capsys):
    with few_lines():
        for number in range(100):
            print("line", number)
    shown = capsys.readouterr().out.splitlines()
    assert shown[:2] == ["line 0", "line 1"] and len(shown) == 21
    assert shown[-1].startswith("... and 80 more lines that your code printed")
    with few_lines():
        for _ in range(100):
            print("x" * 1000, end="")
    assert len(capsys.readouterr().out) <= 4000


def test_print_is_shown_when_a_check_fails_too(exercise, capsys):
    told(exercise, lambda: print("here I am"), lambda solve: 1 / (solve() or 0))
    assert capsys.readouterr().out == "here I am\n" * 2


def test_the_stop_button_shows_the_line_and_no_traceback(exercise, tmp_path):
    stopped = of_a_cell("def solve():\n    raise KeyboardInterrupt\n", tmp_path)
    with pytest.raises(KeyboardInterrupt) as caught:
        judge(exercise, stopped, Part("runs", lambda solve: solve()))
    assert caught.value._render_traceback_() == [
        "The check was interrupted. It came from line 2 of your cell: raise KeyboardInterrupt"
    ]
    assert exercise not in answers.recorded("checks")
