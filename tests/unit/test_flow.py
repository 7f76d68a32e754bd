"""Values of a flow."""

from __future__ import annotations

import pytest

from tproxyd.flow import Endpoint


@pytest.mark.parametrize(
    ("endpoint", "text", "version"),
    [(Endpoint("10.0.0.1", 80), "10.0.0.1:80", 4), (Endpoint("fd01::2", 80), "[fd01::2]:80", 6)],
)
def test_an_endpoint_is_written_as_in_a_url(endpoint: Endpoint, text: str, version: int) -> None:
    assert str(endpoint) == text
    assert endpoint.version == version
