"""Every test runs on eight CPU devices, with strict types, and any warning is an error."""

import importlib.util
import os
import tempfile
from pathlib import Path

# Many tests, the workers that share them and the processes that some of them start compile the same programs.  What is
# compiled for hardware that is not there, in an environment that has its compilers, cannot be read back.
if "PYTEST_XDIST_WORKER" not in os.environ and importlib.util.find_spec("libtpu") is None:
    CACHE = tempfile.TemporaryDirectory(prefix="jattrib-tests-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = CACHE.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()

import jax
import jaxtyping
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def x64():
    """Double precision for one test: the oracles' arithmetic."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def key():
    return jax.random.key(0)


@pytest.fixture
def shapes_unchecked():
    """As users have it: shapes are not checked on the way in, so that the errors are the functions' own."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(autouse=True)
def programs_let_go():
    """A compiled program is a dozen maps of memory, of which a process may hold so many: past them, it crashes."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 30_000:
        jax.clear_caches()
