"""Every check of `mininet/checks.py`, in every topology, with both rulesets: the four-tuple, from packets."""

import pytest
import scenario

pytestmark = pytest.mark.topology


@pytest.fixture(
    scope="module",
    params=[(topology, ruleset) for topology in scenario.TOPOLOGIES for ruleset in scenario.RULESETS],
    ids="-".join,
)
def results(request):
    return {result.check: result for result in scenario.run(*request.param)}


@pytest.mark.parametrize("check", [*scenario.CHECK_NAMES, "finished", "nothing-left-behind"])
def test_what_crosses_the_gateways_is_kept(results, check):
    if check not in results:
        pytest.fail(f"the scenario did not come to it: {results['finished'].problem}")
    result = results[check]
    assert result.ok, f"{check}\n{result.table()}\n{result.logs}"


def test_every_check_is_made():
    from checks import CHECKS

    assert tuple(CHECKS) == scenario.CHECK_NAMES
