import pytest
from helpers import make


@pytest.fixture
def rec():
    "24 minibatches of 3 layers, in two fits"
    return make(fits=(('freeze', 2), ('unfreeze', 4)), P=3)
