"""For all tests: programs share the processors with others, so their threads must not wait by spinning (see runner.py)."""

import os

from llmgen import runner

os.environ.update(runner.environment())
