"""accelerate collects garbage at every `train()`: looking through what imports made costs more than the tests do."""

import gc

import pytest


@pytest.fixture(scope="session", autouse=True)
def imports_are_no_garbage():
    gc.freeze()
    yield
    gc.unfreeze()
