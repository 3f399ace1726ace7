"""``lab.show``: the package's own source, as it stands in the file."""

import functools
from pathlib import Path

import pytest

import flserving
from flserving import ModelCache, ModelServer
from flserving.lab.workbook.sentences import SentenceError
from flserving.lab.workbook.sources import show


def test_a_method_is_shown_with_its_file_as_the_file_has_it():
    shown = show(ModelCache.lease)
    path = Path(flserving.__file__).parents[1] / shown.file
    assert shown.file == "flserving/serving/cache.py"
    file = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    assert all(line.strip() in file for line in shown.code.splitlines())
    assert repr(shown).startswith("flserving/serving/cache.py\n@contextmanager\ndef lease(")
    assert shown._repr_markdown_().startswith(
        f"`{shown.file}`:\n\n```python\n@contextmanager\ndef lease("
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
