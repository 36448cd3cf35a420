"""For all tests: programs share the processors with others, so their threads must not wait by spinning (see runner.py).

For the tests of CUDA kernels: where they run.
"""

import os

import emulator
import numpy as np
import pytest

from llmgen import runner
from llmgen.cuda import architecture

os.environ.update(runner.environment())


@pytest.fixture(scope="session", params=["emulator", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request):
    if request.param == "emulator" and not emulator.available():
        pytest.skip("the emulator needs g++ on x86-64 Linux")
    if request.param == "gpu" and architecture.present() is None:
        pytest.skip("no GPU here")
    return request.param


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Where kernels are compiled, once for all tests, those of other workers included."""
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cuda"
    shared.mkdir(exist_ok=True)
    return shared


@pytest.fixture
def rng():
    return np.random.default_rng(0)
