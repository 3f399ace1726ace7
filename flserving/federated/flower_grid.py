"""Flower without Ray: every client of a run in this process. Imported by ``flower``, which says
what it needs.

Two of Flower's own hands are borrowed, because no public one does it: the task's identity, without
which no message can be made, and the message id, which else the transport gives.
"""

import copy
import logging
from collections.abc import Iterable, Mapping
from typing import Any
from uuid import uuid4

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.task_identity import TaskIdentity

from flserving.errors import ConfigError, check_number

_LOG = logging.getLogger("flwr")
_PATIENCE = 10  # times, a second apart, that a strategy may look for more clients than there are


class LocalGrid(Grid):
    """Flower's grid with every client in this process, one after the other: no Ray, no network, no
    files.

    ``strategy.start(grid=LocalGrid(client_app, 10), ...)`` is a whole run, also in a notebook. As
    in Flower's own simulation, a client finds ``partition-id`` and ``num-partitions`` in its
    context, its ``state`` survives the rounds (but for a call that failed), and what it raises
    becomes an error reply, its traceback in the log of flwr.

    Raises:
        ConfigError: Wrong arguments; a strategy that waits for more clients than there are.
    """

    def __init__(
        self,
        client_app: ClientApp,
        num_supernodes: int,
        run_config: Mapping[str, bool | int | float | str] | None = None,
    ) -> None:
        if not isinstance(client_app, ClientApp):
            raise ConfigError(
                f"client_app is a {type(client_app).__name__}: give a flwr.clientapp.ClientApp"
            )
        check_number("num_supernodes", num_supernodes, 1, 1_000_000, whole=True)
        self.client_app = client_app
        self._run = None
        self._run_config = dict(run_config or {})
        self._contexts = {
            i + 1: self._context(i + 1, {"partition-id": i, "num-partitions": num_supernodes})
            for i in range(num_supernodes)
        }
        self._replies: dict[str, Message] = {}
        self._idle = 0
        self._busy = False
        # without it no message can be made; a real run has its own
        if TaskIdentity._run_id is None:
            TaskIdentity.run_id = 1
            TaskIdentity.task_id = 1
            TaskIdentity.node_id = 1

    def _context(self, node_id: int, node_config: dict[str, int]) -> Context:
        return Context(1, node_id, node_config, RecordDict(), dict(self._run_config))

    def server_context(self) -> Context:
        """A context for a server app that runs on this grid."""
        return self._context(0, {})

    def set_run(self, run: Any) -> None:
        """Flower's description of the run; nothing here needs it."""
        self._run = run

    @property
    def run(self) -> Any:
        """What :meth:`set_run` was given."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """A message to a client."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        """All clients; Flower's strategies call it once a second until there are enough."""
        self._idle += not self._busy
        if self._idle > _PATIENCE:
            raise ConfigError(
                f"the strategy waits for more clients than the {len(self._contexts)} of this run: raise num_supernodes "
                "or lower the strategy's min_available_nodes and min_train_nodes"
            )
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Let the clients answer; returns the messages' ids."""
        replies = [self._answer(message) for message in messages]
        self._replies |= {reply.metadata.reply_to_message_id: reply for reply in replies}
        return [reply.metadata.reply_to_message_id for reply in replies]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The replies to these messages, each of them once."""
        return [
            self._replies.pop(message_id)
            for message_id in message_ids
            if message_id in self._replies
        ]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Push and pull; nothing here ever comes too late."""
        return self.pull_messages(self.push_messages(messages))

    def _answer(self, message: Message) -> Message:
        """One client's reply. Both sides work on copies, as if a network lay between them."""
        message.metadata.__dict__["_message_id"] = str(uuid4())  # as Flower's simulation sets it
        self._idle = 0
        self._busy = True
        try:
            context = copy.deepcopy(self._contexts[message.metadata.dst_node_id])
            reply = copy.deepcopy(self.client_app(copy.deepcopy(message), context))
            if not isinstance(reply, Message):
                raise TypeError(f"the client app returned a {type(reply).__name__}, not a Message")
            self._contexts[message.metadata.dst_node_id] = context
        except Exception as error:  # one client's fault is one lost reply
            _LOG.exception("client %s failed", message.metadata.dst_node_id)
            reason = f"{type(error).__name__}: {error}"
            reply = Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)
        finally:
            self._busy = False
        reply.metadata.__dict__["_message_id"] = str(uuid4())
        return reply


def run(
    server_app: ServerApp,
    client_app: ClientApp,
    num_supernodes: int,
    run_config: Mapping[str, bool | int | float | str] | None = None,
) -> Context:
    """A whole Flower app in this process: ``run_simulation`` without Ray. Returns the server's
    context, with its state.

    Args:
        num_supernodes: Clients. ``run_config``: what the apps find in ``context.run_config``.

    Raises:
        ConfigError: Wrong arguments. Whatever the server app raises.
    """
    if not isinstance(server_app, ServerApp):
        raise ConfigError(
            f"server_app is a {type(server_app).__name__}: give a flwr.serverapp.ServerApp"
        )
    grid = LocalGrid(client_app, num_supernodes, run_config)
    context = grid.server_context()
    server_app(grid, context)
    return context
