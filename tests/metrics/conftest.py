import jaxtyping
import pytest


@pytest.fixture
def shapes_unchecked():
    """As users have it: shapes are not checked on the way in, so that the errors are the functions' own."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
