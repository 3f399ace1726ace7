"""Retry storms in virtual time that end or do not, and policies that meet the same storm."""

import random

import pytest

from flserving.errors import ServerClosedError
from flserving.lab.queueing import storm


@pytest.fixture(scope="module")
def storms():
    return {name: storm.simulate_storm(**how) for name, how in storm.SCENARIOS.items()}


def test_only_retries_without_bound_keep_a_server_down_that_has_room_for_all(storms):
    alone, retries, budget, dropped = storms.values()
    assert (retries.answered_share()[9:] == 0).all() and retries.tries_per_s()[20:].min() > 3 * 300
    for healed in (alone, budget, dropped):
        assert (healed.answered_share()[:4] == 1).all() and (
            healed.answered_share()[14:] == 1
        ).all()
        assert healed.tries_per_s()[20:].max() < 1.3 * 300
    # who drops late work answers even those who asked again
    assert dropped.answered.mean() > budget.answered.mean()


def test_without_an_outage_nobody_asks_again():
    calm = storm.simulate_storm(stands_still_s=(5, 5), seconds=10)
    assert calm.answered.all() and len(calm.try_s) == len(calm.call_s)
    assert (
        storm.simulate_storm(stands_still_s=(5, 5), seconds=10).try_s.tolist()
        == calm.try_s.tolist()
    )


def test_a_policy_that_blocks_meets_the_same_storm():
    """It is run again for each try, and nobody notices: the tries come when it says, its budget is
    asked once."""
    asked, told = [], []

    class Budget:
        def may_retry(self):
            asked.append(1)
            return len(asked) % 2

        def answered(self):
            told.append(1)

    def policy(send, deadline_s, budget, clock, sleep):
        end_s = clock() + deadline_s
        while True:
            try:
                answer = send(min(0.5, end_s - clock()))
            except ServerClosedError:
                if not budget.may_retry() or clock() + 0.25 >= end_s:
                    raise
                sleep(0.25)
            else:
                budget.answered()
                return answer

    settings = {
        "rate_per_s": 1,
        "seconds": 10,
        "stands_still_s": (0, 9.9),
        "clients": 1,
        "timeout_s": 1,
    }
    before = random.getstate()
    stood = storm.simulate_storm(policy=policy, make_budget=Budget, deadline_s=2, **settings)
    assert random.getstate() == before
    first_s, second_s = sorted(set(stood.try_s) - set(stood.call_s))[0], stood.call_s[0]
    # half a second as the policy said, then its wait
    assert first_s == pytest.approx(second_s + 0.75)
    assert len(asked) == len(stood.try_s) - len(told) and len(told) == stood.answered.sum()
    calm = storm.simulate_storm(policy=policy, make_budget=Budget, stands_still_s=(5, 5), seconds=5)
    assert calm.answered.all() and len(calm.try_s) == len(calm.call_s)


def test_an_error_of_the_policy_is_seen():
    def unsolved(send, deadline_s, budget, clock, sleep):
        raise NotImplementedError

    with pytest.raises(NotImplementedError):
        storm.simulate_storm(policy=unsolved)
