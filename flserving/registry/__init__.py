"""The Model Registry: immutable versions on disk, what is known of them, and aliases that lead to
them.

``registry.py`` is the room's textbook file: publish, read, verify. ``manifest.py`` is what a
version says of itself, ``validation.py`` what is checked before anything is written, ``storage.py``
how files become durable. ``index.py`` is the database of names, aliases and their history. Personal
heads: ``heads.py`` and ``headfile.py`` (notebook 07). Experiments' definitions: ``experiment.py``
(notebook 10). DataFrames: ``tables.py``.
"""

from flserving.registry.experiment import Arm, Experiment, Policy
from flserving.registry.heads import HeadSet
from flserving.registry.manifest import Lineage, Manifest
from flserving.registry.registry import Registry

__all__ = ["Arm", "Experiment", "HeadSet", "Lineage", "Manifest", "Policy", "Registry"]
