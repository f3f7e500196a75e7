"""What every test gets: a seed of its own, and the backend it asks for."""

import hashlib
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def seed_of_the_test(request: pytest.FixtureRequest) -> None:
    """Seeded by the test's name: the same numbers alone, in the whole suite and in any order."""
    torch.manual_seed(int.from_bytes(hashlib.sha256(request.node.nodeid.encode()).digest()[:4], "little"))


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
