"""How much device memory the kernels need beside the tensors, and how many rows of logits exist at a time."""

from llmgen.config import Config
from llmgen.cuda import products
from llmgen.cuda.architecture import Architecture
from llmgen.graph import Graph

LOGITS_BYTES = 4 << 30  # at most so much for a chunk of logits


def chunk_rows(rows: int, row_bytes: int) -> int:
    """Rows of logits at a time: all of them, or an even part of them that fits."""
    parts = -(-rows * row_bytes // LOGITS_BYTES)
    return -(-rows // max(parts, 1))


def bytes(graph: Graph, config: Config, machine: Architecture) -> int:
    """The most that any one kernel needs: they run one after another."""
    shapes, precision = products.shapes(graph), config.program.precision
    return max([64 << 20, *(products.scratch_bytes(shape, precision, machine.multiprocessors) for shape in shapes)])
