"""Builders: a Config in, a Graph out."""

from llmgen.config import Config
from llmgen.graph import Graph
from llmgen.models import transformer


def build(config: Config) -> Graph:
    return transformer.build(config)


def parameter_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Parameter name -> stacked shape, in the order of the files."""
    return {p.name: tuple(d.size for d in p.stacked) for p in build(config).parameters}


def count(config: Config) -> int:
    """Parameters as papers count them: vocabulary rows without padding."""
    return transformer.count(config)
