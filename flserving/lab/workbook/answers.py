"""What a student guessed, answered and passed: asked with radio buttons, kept in a small file
beside the notebook.

``my_stack/answers/NOTEBOOK.json`` holds ``{"guesses": {...}, "quizzes": {...}, "checks": {...}}``,
one file for each notebook, so two notebooks at once never write the same one. Where no kernel runs,
or FLSERVING_STATIC=1, the questions are text and nothing is written.
"""

import contextlib
import html
import json
import os
import random
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ipywidgets as widgets
from IPython import get_ipython

from flserving.errors import ConfigError
from flserving.lab.style import is_static

FOLDER = Path("my_stack")  # beside the notebook: a kernel runs in its folder
# files apart: an answer must not stand in the cell that asks
QUIZZES = Path(__file__).parents[1] / "quizzes"
_memory: dict[str, dict[str, Any]] = {}  # where nothing is written
_told_unwritable = False


def shell() -> Any:
    """The IPython that runs this, or None."""
    return get_ipython()


def live() -> bool:
    """Whether somebody sits before a kernel."""
    return getattr(shell(), "kernel", None) is not None and not is_static()


def notebook() -> str:
    """The name of the running notebook without its ending, "notebook" where the front end does not
    tell it."""
    path = os.environ.get("JPY_SESSION_NAME") or ""
    if shell() is not None:
        path = shell().user_ns.get("__vsc_ipynb_file__") or path
    return Path(path).stem or "notebook"


def replace_file(path: Path, content: str | bytes) -> None:
    """Write a file in one step: who reads it sees the old content or the new. OSError: the folder
    is read-only."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, staged = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    if isinstance(content, str):
        content = content.encode()
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(staged, 0o644)
        os.replace(staged, path)
    except BaseException:
        os.unlink(staged)
        raise


def recorded(kind: str) -> dict[str, Any]:
    """What is known of the "guesses", "quizzes" or "checks" of this notebook, by name."""
    found = _load().get(kind)
    if not isinstance(found, dict):
        return {}
    return found


def record(kind: str, name: str, entry: Mapping[str, Any]) -> None:
    """Remember one of them. A folder that cannot be written is told once, and the kernel
    remembers."""
    global _told_unwritable
    everything = _load()
    everything[kind] = {**recorded(kind), name: dict(entry)}
    _memory[notebook()] = everything
    if not live():
        return
    try:
        replace_file(_file(), json.dumps(everything, indent=1, ensure_ascii=False, sort_keys=True))
    except OSError as error:
        if not _told_unwritable:
            print(
                f"Your answers are not kept, {FOLDER} cannot be written: {error.strerror}. All else works."
            )
        _told_unwritable = True


def _file() -> Path:
    return FOLDER / "answers" / f"{notebook()}.json"


def _load() -> dict[str, Any]:
    """The file, or what this kernel remembers. A file that is no longer JSON is put aside, not
    overwritten."""
    remembered = _memory.get(notebook(), {})
    if not live():
        return remembered
    try:
        text = _file().read_text(encoding="utf-8")
    except OSError:
        return remembered
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if isinstance(found, dict):
        return found
    with contextlib.suppress(OSError):
        os.replace(_file(), _file().with_suffix(".damaged.json"))
    return remembered


@dataclass(frozen=True, slots=True)
class Text:
    """Markdown that can be read where no widget runs."""

    markdown: str

    def _repr_markdown_(self) -> str:
        return self.markdown

    def __repr__(self) -> str:
        return self.markdown.replace("**", "")


class Asked(widgets.VBox):  # type: ignore[misc]
    """Radio buttons whose text a notebook stores beside them, for readers without a kernel."""

    def __init__(self, text: Text, children: Sequence[widgets.Widget]) -> None:
        self.text = text
        super().__init__(children)

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        bundle = super()._repr_mimebundle_(**kwargs)
        return {**bundle, "text/plain": repr(self.text), "text/markdown": self.text.markdown}


def guess(name: str, *choices: str) -> Asked | Text:
    """Ask for a guess; end the cell with this call. It can be changed until :func:`reveal` has
    shown the measurement.

    Args:
        name: What is guessed, for example "hit rate"; ``reveal`` takes the same name.
        *choices: Two or more different texts, with their units.
    """
    if len(set(choices)) < 2 or len(set(choices)) < len(choices):
        raise ConfigError(f"guess {name!r} needs two or more different choices, got {choices}")
    text = Text(f"**Guess the {name}:** {', '.join(choices[:-1])} or {choices[-1]}?")
    if not live():
        return text
    before = recorded("guesses").get(name, {})
    buttons = _buttons(choices, before.get("guess"))
    note = widgets.HTML()
    if "measured" in before:
        buttons.disabled = True
        note.value = "It was measured already: this was your guess."

    def keep(change: Mapping[str, Any]) -> None:
        if change["new"] is not None:
            record("guesses", name, {"choices": list(choices), "guess": change["new"]})
            note.value = "Kept. Read on; you will see what was measured."

    buttons.observe(keep, names="value")
    return Asked(text, [widgets.HTML(f"<b>Guess the {html.escape(name)}</b>"), buttons, note])


def reveal(name: str, measured: str) -> Text:
    """The guess beside what was measured; end the cell with this call.

    Args:
        name: As in :func:`guess`.
        measured: The measurement as a text with its unit: ``f"{hit_rate:.0%}"``.
    """
    entry = recorded("guesses").get(name, {})
    if "guess" not in entry:
        return Text(
            f"**{name}:** measured {measured}. Your guess stands beside it once you have made one."
        )
    record("guesses", name, {**entry, "measured": str(measured)})
    others = [choice for choice in entry.get("choices", []) if choice != entry["guess"]]
    return Text(
        f"**{name}:** you guessed {entry['guess']}, measured {measured} (other choices: {', '.join(others)})."
    )


@dataclass(frozen=True, slots=True)
class Question:
    """One question of a quiz: the correct answer and its reason, and wrong ones, each with what is
    wrong with it."""

    text: str
    answer: str
    because: str
    wrong: Mapping[str, str]

    def choices(self) -> list[str]:
        """All answers in an order that depends on the question alone."""
        found = [self.answer, *self.wrong]
        random.Random(self.text).shuffle(found)
        return found

    def told(self, choice: str) -> str:
        """What to say to an answer."""
        if choice == self.answer:
            return f"Correct: {self.because}"
        return f"No: {self.wrong[choice]}"


def questions(name: str) -> list[Question]:
    """What ``quizzes/NAME.md`` asks: its headings. ``[x]`` is the correct answer, and a reason
    follows each."""
    found = []
    file = QUIZZES / f"{name}.md"
    _, *parts = file.read_text(encoding="utf-8").split("\n## ")
    for asked in parts:
        text, _, _ = asked.partition("\n")
        told = re.findall(r"^- \[([ x])\] (.+)\n  - (.+)$", asked, re.MULTILINE)
        wrong = {choice: reason for mark, choice, reason in told if mark == " "}
        correct = [(choice, reason) for mark, choice, reason in told if mark == "x"]
        different = {choice for _, choice, _ in told}
        if len(correct) != 1 or not wrong or len(different) < asked.count("\n- "):
            raise ConfigError(
                f"question {text!r} needs one correct answer and at least one other, each with a reason"
            )
        found.append(Question(text, *correct[0], wrong))
    return found


def quiz(name: str) -> Asked | Text:
    """Multiple choice with a reason for every answer; end the cell with this call. First and last
    answers are kept.

    Args:
        name: Of a file of questions in ``flserving/lab/quizzes``, without its ending: that of the
            notebook.
    """
    asked = questions(name)
    lines = []
    for number, question in enumerate(asked, start=1):
        lines.append(f"**{number}. {question.text}**")
        lines += [f"- {choice}" for choice in question.choices()]
        lines.append("")
    text = Text("\n".join(lines).strip())
    if not live():
        return text
    return Asked(text, [_asked(number, question) for number, question in enumerate(asked, start=1)])


def _asked(number: int, question: Question) -> widgets.VBox:
    before = recorded("quizzes").get(question.text, {})
    buttons = _buttons(question.choices(), before.get("last"))
    reason = widgets.HTML()
    if buttons.value:
        reason.value = html.escape(question.told(buttons.value))

    def answered(change: Mapping[str, Any]) -> None:
        choice = change["new"]
        if choice is None:
            return
        before = recorded("quizzes").get(question.text, {})
        entry = {"first": choice, **before, "last": choice}
        entry["correct"] = entry["first"] == question.answer
        record("quizzes", question.text, entry)
        reason.value = html.escape(question.told(choice))

    buttons.observe(answered, names="value")
    return widgets.VBox(
        [widgets.HTML(f"<b>{number}. {html.escape(question.text)}</b>"), buttons, reason]
    )


def _buttons(choices: Sequence[str], chosen: Any) -> widgets.RadioButtons:
    """``chosen`` is marked, where it is still one of the choices."""
    layout = widgets.Layout(width="max-content")
    value = chosen if chosen in choices else None
    return widgets.RadioButtons(options=list(choices), value=value, layout=layout)
