"""Rewrites of the graph, chosen per target."""

from llmgen.config import ProgramConfig
from llmgen.graph import Graph
from llmgen.passes import fusion, precision, recompute


def for_target(graph: Graph, target: str, chunk: int, program: ProgramConfig, wgmma: bool = False) -> Graph:
    """The graph as a target computes it.

    chunk: rows of logits the classifier holds at a time.
    wgmma: the products are Hopper's, where the gradient of the bias before a GELU is cheaper in the weight gradient.
    """
    functions = []
    for function in graph.functions:
        if program.recompute != "none":
            function = getattr(recompute, program.recompute)(function)
        function = fusion.join_segments(function)
        function = fusion.add_into(function)
        function = fusion.linear_gelu(function)
        function = fusion.linear_backward_gelu(function)
        functions.append(fusion.classifier(function, chunk))
    if target == "cuda":
        summing = fusion.SUMMING[:1] if wgmma else fusion.SUMMING
        functions = [fusion.bias_sums(function, summing) for function in fusion.gelu_slopes(functions)]
    graph = Graph(graph.parameters, tuple(functions))
    return precision.bf16(graph, program.residual_precision) if program.precision == "bf16" else graph
