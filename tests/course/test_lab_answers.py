"""Guesses and quizzes: asked once, kept in a file, never lost, and text where no kernel runs."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from flserving.errors import ConfigError
from flserving.lab.workbook import answers
from flserving.lab.workbook.answers import Asked, Text, guess, questions, quiz, reveal

VIEW = "application/vnd.jupyter.widget-view+json"
WHO = """# Of eviction

## Who goes first?

- [ ] the oldest
  - FIFO
- [x] the coldest
  - its last use is the oldest
- [ ] the <b>
  - no such thing
"""


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(answers, "_memory", {})
    monkeypatch.setattr(answers, "_told_unwritable", False)
    monkeypatch.setattr(answers, "QUIZZES", tmp_path)
    Path("who.md").write_text(WHO)


@pytest.fixture
def kernel(monkeypatch):
    """A kernel of notebook 03 with somebody before it."""
    monkeypatch.delenv("FLSERVING_STATIC", raising=False)
    monkeypatch.setenv("JPY_SESSION_NAME", "course/03_caching.ipynb")
    monkeypatch.setattr(answers, "shell", lambda: SimpleNamespace(kernel=True, user_ns={}))


FILE = Path("my_stack/answers/03_caching.json")


def stored():
    return json.loads(FILE.read_text(encoding="utf-8"))


def buttons(asked):
    return asked.children[1]


def test_a_guess_is_kept_and_stands_beside_the_measurement(kernel):
    asked = guess("hit rate", "25 %", "48 %", "63 %")
    assert buttons(asked).value is None and not FILE.exists()
    assert "Your guess stands beside it once" in repr(reveal("hit rate", "50 %"))
    buttons(asked).value = "25 %"
    buttons(asked).value = "63 %"
    assert stored() == {
        "guesses": {"hit rate": {"choices": ["25 %", "48 %", "63 %"], "guess": "63 %"}}
    }
    again = guess("hit rate", "25 %", "48 %", "63 %")  # the cell is run twice
    assert buttons(again).value == "63 %" and not buttons(again).disabled
    told = reveal("hit rate", "50 %")
    assert repr(told) == "hit rate: you guessed 63 %, measured 50 % (other choices: 25 %, 48 %)."
    assert told._repr_markdown_().startswith("**hit rate:** you")
    assert stored()["guesses"]["hit rate"]["measured"] == "50 %"
    late = guess("hit rate", "25 %", "48 %", "63 %")
    assert buttons(late).disabled and buttons(late).value == "63 %"


def test_what_a_notebook_stores_can_be_read_without_a_kernel(kernel, monkeypatch):
    live = guess("hit rate", "25 %", "48 %")._repr_mimebundle_()
    assert live.keys() == {VIEW, "text/plain", "text/markdown"}
    monkeypatch.setenv("FLSERVING_STATIC", "1")
    static = guess("hit rate", "25 %", "48 %")
    assert isinstance(static, Text)
    assert (repr(static), static._repr_markdown_()) == (live["text/plain"], live["text/markdown"])
    assert repr(static) == "Guess the hit rate: 25 % or 48 %?"
    assert isinstance(quiz("who"), Text) and "- the coldest" in repr(quiz("who"))
    answers.record("checks", "lru", {"tries": 1})
    assert answers.recorded("checks") == {"lru": {"tries": 1}} and not Path("my_stack").exists()


def test_a_quiz_gives_a_reason_for_every_answer_and_keeps_the_first_and_the_last(kernel):
    asked = quiz("who")
    assert isinstance(asked, Asked)
    _, choices, reason = asked.children[0].children
    assert (
        sorted(choices.options) == ["the <b>", "the coldest", "the oldest"]
        and choices.value is None
    )
    choices.value = "the <b>"
    assert reason.value == "No: no such thing"
    choices.value = "the coldest"
    assert reason.value == "Correct: its last use is the oldest"
    assert stored()["quizzes"] == {
        "Who goes first?": {"first": "the <b>", "last": "the coldest", "correct": False}
    }
    assert quiz("who").children[0].children[1].value == "the coldest"
    assert questions("who")[0].choices() == questions("who")[0].choices()


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: guess("x"),
        lambda: guess("x", "1 ms"),
        lambda: guess("x", "1 ms", "1 ms", "2 ms"),
    ],
)
def test_guesses_without_a_choice_are_refused(wrong):
    with pytest.raises(ConfigError, match="needs"):
        wrong()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("[x]", "[ ]"),
        ("- [ ] the oldest", "- [x] the oldest"),
        ("[ ] the oldest", "[ ] the coldest"),
        ("  - its last use is the oldest\n", ""),
        ("  - FIFO\n", ""),
        ("[ ] the oldest", "[ ] the <b>"),
        ("- [x]", "[x]"),
    ],
)
def test_a_question_needs_one_correct_answer_and_another(old, new):
    Path("who.md").write_text(WHO.replace(old, new))
    with pytest.raises(ConfigError, match=r"'Who goes first\?' needs one correct answer"):
        quiz("who")


def test_other_choices_than_those_that_were_answered_start_anew(kernel):
    buttons(guess("hit rate", "25 %", "48 %")).value = "25 %"
    assert buttons(guess("hit rate", "30 %", "48 %")).value is None


def test_two_notebooks_write_two_files(kernel, monkeypatch):
    buttons(guess("hit rate", "25 %", "48 %")).value = "25 %"
    monkeypatch.setenv("JPY_SESSION_NAME", "course/04_dynamic_batching.ipynb")
    assert buttons(guess("hit rate", "25 %", "48 %")).value is None
    buttons(guess("hit rate", "25 %", "48 %")).value = "48 %"
    assert {path.stem for path in FILE.parent.iterdir()} == {"03_caching", "04_dynamic_batching"}
    assert stored()["guesses"]["hit rate"]["guess"] == "25 %"


@pytest.mark.parametrize("text", ["{ half a file", "[1]", '{"guesses": 3}'])
def test_a_damaged_file_is_put_aside_and_the_questions_are_asked(kernel, text):
    FILE.parent.mkdir(parents=True)
    FILE.write_text(text)
    buttons(guess("hit rate", "25 %", "48 %")).value = "25 %"
    assert stored()["guesses"]["hit rate"]["guess"] == "25 %"
    aside = FILE.with_suffix(".damaged.json")
    assert text == '{"guesses": 3}' or aside.read_text() == text


def test_a_folder_that_cannot_be_written_is_told_once_and_the_kernel_remembers(kernel, capsys):
    Path("my_stack").write_text("a file")
    buttons(guess("hit rate", "25 %", "48 %")).value = "25 %"
    buttons(guess("miss rate", "25 %", "48 %")).value = "48 %"
    told = capsys.readouterr().out
    assert told.count("Your answers are not kept, my_stack cannot be written") == 1
    assert "you guessed 25 %" in repr(reveal("hit rate", "50 %"))


def test_the_notebook_is_named_by_the_front_end(monkeypatch):
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    assert answers.notebook() == "notebook"
    names = {"__vsc_ipynb_file__": "/course/05_rest.ipynb"}
    monkeypatch.setattr(answers, "shell", lambda: SimpleNamespace(kernel=True, user_ns=names))
    assert answers.notebook() == "05_rest"
