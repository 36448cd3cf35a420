"""Rewrites of the graph, chosen per target."""

from llmgen.graph import Graph
from llmgen.passes import fusion, recompute


def for_target(graph: Graph, target: str, chunk: int, again: str = "none") -> Graph:
    """The graph as a target computes it.

    chunk: rows of logits the classifier holds at a time. again: the config's `recompute`.
    """
    functions = []
    for function in graph.functions:
        if again == "cheap":
            function = recompute.cheap(function)
        function = fusion.join_segments(function)
        function = fusion.add_into(function)
        function = fusion.linear_gelu(function)
        function = fusion.linear_backward_gelu(function)
        function = fusion.classifier(function, chunk)
        functions.append(function)
    return Graph(graph.parameters, tuple(functions))
