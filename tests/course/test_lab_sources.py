"""``lab.show``: the package's own source, as it stands in the file."""

import functools
from pathlib import Path

import pytest

import flserving
from flserving import ModelCache, ModelServer
from flserving.lab.workbook.sentences import SentenceError
from flserving.lab.workbook.sources import show


def test_a_method_is_shown_with_its_file_and_its_line_numbers():
    shown = show(ModelCache.lease)
    path = Path(flserving.__file__).parents[1] / shown.file
    file = path.read_text(encoding="utf-8").splitlines()
    assert shown.file == "flserving/serving/cache.py"
    assert all(file[number - 1].strip() == text.strip() for number, text in shown.lines)
    head, first, *_ = repr(shown).splitlines()
    assert head == f"flserving/serving/cache.py, lines {shown.first} to {shown.last}"
    assert first == f"{shown.first:4} @contextmanager"
    assert shown._repr_markdown_().startswith(
        f"`{shown.file}`, lines {shown.first} to {shown.last}:\n\n```python\n@con"
    )
    assert '"""' not in repr(shown) and '"""' in repr(show(ModelCache.lease, docstring=True))


def test_wrappers_are_looked_through():
    @functools.cache
    def cached():
        """Nothing else."""

    assert '"""Nothing else."""' in repr(show(cached))  # nothing but a docstring stays
    assert "def get" in repr(show(functools.partial(dict_like.get, 3)))
    assert "def two" in repr(show(Thing.two)) and "def three" in repr(show(Thing.three))
    assert repr(show(ModelServer)).count("\n") > 50


class Thing:
    @property
    def two(self):
        return 2

    @functools.cached_property
    def three(self):
        return 3


class dict_like:
    def get(self, key):
        return key


@pytest.mark.parametrize("thing", [len, 3, "text", dict, dict.get])
def test_what_has_no_source_is_told_in_a_sentence(thing):
    with pytest.raises(SentenceError, match="has no Python source to show") as told:
        show(thing)
    assert " ".join(told.value._render_traceback_()[0].split("\n")) == str(told.value)
