"""What the evidence says of a canary: promote it, roll it back, or wait. Pure functions of rewards
by client.

Two mistakes have a price: to promote a version that harms, and to roll back one that does not. Each
is bounded at every look, whenever one looks, by tests that stay valid under peeking
(``statistics.py``):

* *Harm in the mean.* A confidence sequence around the difference of the two arms' means.
* *Harm to one client*, which no mean shows. A canary is promoted only when each client that was
  checked is shown not to be ruined. That is an intersection-union test (R. Berger, Technometrics
  24, 1982): a canary that ruins somebody has to pass the test of just that client, so each runs at
  the full level, however many there are. It is rolled back when *any* client is shown to be below:
  there the clients share the level (a union bound).

Clients differ by themselves. So nobody is compared with the mean, but with the worst client of the
control, and that one's mean is too low rather than too high while rewards are few.
"""

import math
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flserving.experiments import statistics
from flserving.experiments.statistics import Floats, Rewards
from flserving.registry.experiment import Policy

_Flags = NDArray[np.bool_]


class Verdict(NamedTuple):
    decision: Literal["wait", "promote", "rollback"]
    why: str


class Arms(NamedTuple):
    """Rewards of many pairs of arms: how many, and their sum, each [pairs, clients of the arm]; no
    rewards is 0."""

    control_n: Floats
    control_sum: Floats
    canary_n: Floats
    canary_sum: Floats


class Findings(NamedTuple):
    """Of many canaries: arrays [canaries], but ``below`` [canaries, clients]."""

    few: _Flags  # clients in one of the arms
    old: Floats  # mean reward of the control
    new: Floats  # ... and of the canary
    half: Floats  # half the width of the interval around their difference
    lost: _Flags  # the canary is shown to be worse in the mean
    proven: _Flags  # it is shown to lose less than ``effect`` in the mean
    spent: _Flags  # the stated sample is used up
    lowest: Floats  # mean of the control's worst client; NaN: too few have enough rewards
    worst: Floats  # ... and of the canary's
    below: _Flags  # clients that are shown to be below the control's worst one
    checked: _Flags  # enough clients have enough rewards
    spared: _Flags  # all of those are shown not to be ruined

    @property
    def promoted(self) -> _Flags:
        return self.proven & self.spared & ~self.rolled_back

    @property
    def rolled_back(self) -> _Flags:
        return self.below.any(axis=1) | self.lost | (self.spent & ~self.proven)


def findings(policy: Policy, arms: Arms) -> Findings:
    """Judge many canaries of one policy at once. Cost for one: about 0.2 ms and 10 us a client."""
    control_n, control_sum, canary_n, canary_sum = arms
    old, old_variance = statistics.ratio_of_sums(control_n, control_sum)
    new, new_variance = statistics.ratio_of_sums(canary_n, canary_sum)
    variance = old_variance + new_variance
    half = statistics.half_width(variance, policy.alpha, policy.effect)
    wider = statistics.half_width(variance, policy.alpha / 2, policy.effect)
    planned = statistics.information(policy.effect, policy.alpha, policy.power)
    gain = new - old
    of_control = (control_n > 0).sum(axis=1)
    of_canary = (canary_n > 0).sum(axis=1)
    few = np.minimum(of_control, of_canary) < policy.min_clients
    lost = ~few & (gain + wider < 0)
    proven = ~few & (gain - half > -policy.effect)
    spent = ~few & (1 / variance >= planned)

    lowest, _ = _worst(policy, control_n, control_sum, policy.min_clients)
    worst, enough = _worst(policy, canary_n, canary_sum, 1)
    floor = lowest - policy.worst_margin
    means = canary_sum / np.maximum(canary_n, 1)
    possible = enough & (floor > 0)[:, None]
    below = possible & (means < floor[:, None])  # nobody else can be shown to be
    place = np.nonzero(below)
    row = place[0]
    missed = canary_n - canary_sum
    evidence = statistics.log_evidence(canary_n[place], missed[place], 1 - floor[row])
    below[place] = evidence >= np.log(4 * of_canary[row] / policy.alpha)

    wanted = policy.checked_share * of_canary
    checked = ~np.isnan(lowest) & (enough.sum(axis=1) >= wanted)
    spared = checked & (worst >= floor)
    ruined = lowest - max(policy.ruin, policy.worst_margin)
    # evidence is weighed only where it decides
    for one in np.flatnonzero(spared & proven & (ruined > 0)):
        clients = enough[one]
        n = canary_n[one, clients]
        total = canary_sum[one, clients]
        limit = np.full(len(n), ruined[one])
        evidence = statistics.log_evidence(n, total, limit)
        spared[one] = (evidence >= math.log(2 / policy.alpha)).all()
    return Findings(few, old, new, half, lost, proven, spent, lowest, worst, below, checked, spared)


def judge(
    policy: Policy,
    control: Rewards,
    canary: Rewards,
    requests: int = 0,
    failed: int = 0,
    age_s: float = 0.0,
) -> Verdict:
    """What the evidence says of a canary. It may be called after every reward.

    It is rolled back once it is shown that its requests fail more often than ``max_failures``, that
    a client of it is ``worst_margin`` below the control's worst one, or that it loses anything in
    the mean (each with ``alpha / 4``, the clients sharing theirs); and when the stated sample is
    used up without a proof that it loses less than ``effect`` (``1 - power`` where it loses
    nothing). It is promoted once there is that proof (``alpha / 2``), enough of its clients were
    checked, none of them is below, and each is shown not to be ruined (``alpha / 2``).

    Args:
        requests, failed: Of the canary: answered or failed in the model, and failed in the model;
            without the failures of the client that has the most, whose input may be to blame:
            nobody decides alone.
        age_s: Since the canary began; after the policy's ``most_s`` it is rolled back rather than
            waited for.
    """
    verdict = _judge(policy, control, canary, requests, failed)
    if verdict.decision == "wait" and age_s > policy.most_s:
        return Verdict("rollback", f"no verdict within {policy.most_s:g} s: {verdict.why}")
    return verdict


def _judge(
    policy: Policy, control: Rewards, canary: Rewards, requests: int, failed: int
) -> Verdict:
    if statistics.exceeds(requests, failed, policy.max_failures, policy.alpha / 4):
        return Verdict("rollback", f"{failed} of {requests} requests failed in the model")
    found = findings(policy, Arms(*_columns(control), *_columns(canary)))
    lowest = float(found.lowest[0])
    worst = float(found.worst[0])
    if found.below.any():
        client = list(canary)[int(found.below[0].argmax())]
        n, total = canary[client]
        mean = total / n
        return Verdict(
            "rollback", f"client {client!r} gets {mean:.3f}, the control's worst {lowest:.3f}"
        )
    if found.few[0]:
        return Verdict(
            "wait",
            f"{len(canary)} and {len(control)} clients gave rewards: {policy.min_clients} decide",
        )
    old = float(found.old[0])
    new = float(found.new[0])
    means = f"mean reward {new:.4f} against {old:.4f}: {new - old:+z.4f} +- {found.half[0]:.4f}"
    if found.lost[0]:
        return Verdict("rollback", means)
    if found.promoted[0]:
        return Verdict("promote", means)
    if found.rolled_back[0]:
        return Verdict("rollback", f"{means}: no proof within the stated sample")
    if not found.proven[0]:
        return Verdict("wait", means)
    if not found.checked[0]:
        enough = sum(n >= policy.client_rewards for n, _ in canary.values())
        share = (
            f"{policy.checked_share:.0%} of these and {policy.min_clients} of the control's decide"
        )
        given = f"{enough} of {len(canary)} clients gave {policy.client_rewards} rewards"
        return Verdict("wait", f"{means}; {given}: {share}")
    return Verdict(
        "wait",
        f"{means}; the worst client {worst:.3f}, the control's {lowest:.3f}: not shown to be spared",
    )


def _columns(rewards: Rewards) -> tuple[Floats, Floats]:
    pairs = np.array(list(rewards.values()), np.float64)
    both = pairs.reshape(1, -1, 2)
    return both[:, :, 0], both[:, :, 1]


def _worst(policy: Policy, n: Floats, total: Floats, least: int) -> tuple[Floats, _Flags]:
    """The worst mean of each arm's clients that have enough rewards, NaN where fewer than ``least``
    have; and which clients those are."""
    enough = n >= policy.client_rewards
    means = np.where(enough, total / np.maximum(n, 1), np.inf)
    worst = means.min(axis=1, initial=np.inf)
    known = enough.sum(axis=1) >= least
    return np.where(known, worst, np.nan), enough
