"""What of the integrations needs no other framework: the words where it is missing, and rounds that
it would make."""

import sys
from dataclasses import replace

import pytest

from flserving import Registry
from flserving.errors import NotSupportedError
from flserving.federated import train
from flserving.federated.heads import fit_heads
from flserving.federated.rounds import Origin, publish_rounds


def test_without_flwr_the_words_say_what_to_install_and_where(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("flserving.federated.flower")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "flwr", None)
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "0")  # so that what the import sets is taken back
    with pytest.raises(
        NotSupportedError, match=r'pip install "flserving\[flower\]" in an environment of its own'
    ):
        import flserving.federated.flower  # noqa: F401


def test_a_round_of_another_framework_is_published_and_gets_heads(tmp_path):
    run = train(num_clients=3, rounds=1, local_epochs=1, progress=False)
    facts = {"config.lr": 0.3, "data": "d"}
    origin = Origin(strategy="FedOther", architecture="digits_mlp", parameters={}, facts=facts)
    result = replace(run.final, recipe=origin)
    with Registry(tmp_path) as registry:
        lineage = publish_rounds(registry, "m")(result).lineage
    assert lineage.strategy == "FedOther" and lineage.num_clients == 3
    assert lineage.extra == facts | {"rejected_clients": 0}
    ours, theirs = (fit_heads(it, clients=run.clients).heads.weights for it in (run.final, result))
    # this run's settings are the defaults, which the other round falls back on
    assert (ours == theirs).all()
