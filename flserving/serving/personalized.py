"""A server of personal models: one shared body, one head per client."""

import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from flserving.errors import ConfigError, InvalidInputError
from flserving.extras import of_extra
from flserving.models.processing import Several
from flserving.serving.config import ServingConfig
from flserving.serving.engine import Answer
from flserving.serving.server import ModelServer, dealt_out
from flserving.serving.synonyms import version_id_too

if TYPE_CHECKING:
    import pandas as pd
    from torch import nn

    from flserving.registry import Registry


class PersonalizedServer(ModelServer):
    """A :class:`ModelServer` whose callers say who they are: each row is answered by its client's
    own head.

    The heads are part of a version (``registry.publish(..., heads=)``), trained and never random.
    Who has none, or one that was trained on another body, is answered by the global head, and the
    answer's ``head`` says so; with ``ServingConfig(unknown_client="refuse")`` an unknown client is
    refused.
    """

    def __init__(
        self,
        config: ServingConfig | None = None,
        registry: "Registry | None" = None,
        model: str | None = None,
        *,
        clock: Callable[[], float] = time.perf_counter,
        global_model: "nn.Module | None" = None,
        num_clients: int | None = None,
    ) -> None:
        if hasattr(config, "state_dict") or global_model is not None or num_clients is not None:
            raise ConfigError(
                "a module and a number of clients make no heads: heads are trained, never random. Publish them with "
                "their body, registry.publish(name, module, architecture=..., heads=...), and serve that: "
                "PersonalizedServer(registry=registry)"
            )
        super().__init__(config, registry, model, clock=clock)

    @version_id_too
    def predict(  # type: ignore[override]
        self,
        client_id: str | Sequence[str],
        features: Any,
        version: str | int | None = None,
        **options: Any,
    ) -> Answer:
        """Answer a client: a row [D] or rows [N, D], by its own head.

        Args:
            client_id: Who asks; one id a row lets rows of many clients share a batch.
            options: Those of :meth:`ModelServer.predict`.

        Returns:
            The answer of :meth:`ModelServer.predict`, with ``head``.

        Raises:
            NotFoundError: No such version, or an unknown client where the configuration refuses it.
            InvalidInputError: Also ids that are not strings, or not one for each row.
        """
        # the server takes None for "not asked"
        client: Sequence[str] = () if client_id is None else client_id
        return super().predict(features, version, client=client, **options)

    @version_id_too
    def batch_predict(
        self, batch: Iterable[tuple[str, Any]], version: str | int | None = None, **options: Any
    ) -> list[Answer]:
        """Answer requests of many clients, each ``(client_id, row [D])``, as one batch: the body
        runs once.

        Returns:
            One answer per request, in their order; their ``latency_ms`` is that of the whole.

        Raises:
            InvalidInputError: Empty, or not of that form. What :meth:`predict` raises.
        """
        try:
            clients, rows = zip(*batch, strict=True)
            table = Several(rows)
        except (TypeError, ValueError) as error:
            refusal = InvalidInputError(
                f"the batch is not a list of (client_id, row [D]), at least one: {error}"
            )
            self.telemetry.failure(refusal.reason)
            raise refusal from error
        answer = self.predict(clients, table, version, **options)
        answers = dealt_out(answer, [1] * len(clients))
        for one in answers:
            (one["head"],) = one["head"]
            one["model_type"] = "personal" if one["head"] == "own" else "global"
        return answers

    def accuracy(
        self,
        clients: Sequence[Any],
        versions: Sequence[str | int] | None = None,
        model: str | None = None,
    ) -> "pd.DataFrame":
        """How right each version is on the clients' held-out samples, measured by asking it.

        Args:
            clients: Each with an ``id``, and its held-out samples ``test_x`` [N, D] with labels
                ``test_y`` [N].

        Returns:
            One row per version: ``global_accuracy`` (the global model, all samples together),
            ``mean_client_accuracy`` and ``worst_client_accuracy`` (over clients, each by its own
            head), ``worst_client`` (its id), ``own_heads`` (how many clients have one that fits).

        Raises:
            InvalidInputError: No clients.
            NotFoundError: No such version, or a client without a head where the configuration
                refuses it.
        """
        with of_extra("course"):
            import pandas as pd

        if not clients:
            raise InvalidInputError(
                "there are no clients: give at least one, with held-out samples"
            )

        if versions is None:
            name = self._router.routes.model if model is None else model
            versions = self._router.routes.of(name).versions
        table = []
        for version in versions or ["default"]:  # of an unknown model: the look-up then says so
            right: dict[str, float] = {}
            hits = 0
            own = 0
            for client in clients:
                answer = self.predict(client.id, client.test_x, version, model=model, arrays=True)
                right[client.id] = float((answer["predictions"] == client.test_y).mean())
                own += answer["head"] == "own"
                shared = ModelServer.predict(self, client.test_x, version, model=model, arrays=True)
                hits += int((shared["predictions"] == client.test_y).sum())
            worst = min(right, key=right.__getitem__)
            row = {
                "version": str(version),
                "global_accuracy": hits / sum(len(client.test_y) for client in clients),
                "mean_client_accuracy": sum(right.values()) / len(right),
                "worst_client_accuracy": right[worst],
                "worst_client": worst,
                "own_heads": own,
            }
            table.append(row)
        return pd.DataFrame(table).set_index("version")
