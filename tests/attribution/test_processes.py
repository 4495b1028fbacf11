"""Training and attribution have one answer: on one device, on eight, and on two processes of two devices each."""

from pathlib import Path

import numpy as np
import pytest

from jattrib.core import mesh as meshes
from tests.attribution.two_processes import attribute
from tests.distributed import run_two


@pytest.fixture(scope="module")
def one_device():
    return attribute(None)


def assert_alike(found, expected):
    np.testing.assert_allclose(found["losses"], expected["losses"], rtol=1e-5)
    np.testing.assert_allclose(found["scores"], expected["scores"], atol=2e-4 * np.abs(expected["scores"]).max())


def test_eight_devices(one_device):
    assert_alike(attribute(meshes.data_mesh()), one_device)


def test_two_processes(one_device, tmp_path):
    ranks = run_two(Path(__file__).with_name("two_processes.py"), tmp_path)
    np.testing.assert_array_equal(ranks[0]["scores"], ranks[1]["scores"])
    for rank in ranks:
        assert_alike(rank, one_device)
