"""Which version answers whom while two are compared, and what the answers were worth.

``controller.py`` chooses an arm for each request and ends an experiment; ``canary.py`` and
``statistics.py`` say when there is evidence enough, ``bandit.py`` and ``shadow.py`` are two other
ways to compare. ``feedback.py`` keeps rewards, and ``bookkeeping.py`` is the thread that writes
them down.
"""

from flserving.experiments.canary import Verdict, judge
from flserving.experiments.controller import Experiments

__all__ = ["Experiments", "Verdict", "judge"]
