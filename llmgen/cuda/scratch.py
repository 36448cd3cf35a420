"""How much device memory the kernels need beside the tensors, and how many rows of logits exist at a time."""

from llmgen.config import Config
from llmgen.cuda import attention, elementwise, products
from llmgen.cuda.architecture import Architecture
from llmgen.graph import Graph

LOGITS_BYTES = 4 << 30  # at most so much for a chunk of logits


def chunk_rows(rows: int, row_bytes: int) -> int:
    """Rows of logits at a time: all of them, or an even part of them that fits."""
    parts = -(-rows * row_bytes // LOGITS_BYTES)
    return -(-rows // max(parts, 1))


def turns(graph: Graph, config: Config, machine: Architecture) -> int:
    """Counters of the kernel that runs; only those for Hopper have some."""
    if not machine.uses_wgmma(config.program.precision):
        return 0
    return max(attention.COUNTERS, *(products.turns(*product) for product in _products(graph, config, machine)))


def _products(graph: Graph, config: Config, machine: Architecture) -> list[tuple]:
    """Each with what computes it."""
    precision = config.program.precision
    machines = precision, machine.multiprocessors, machine.uses_wgmma(precision), machine.tuned
    return [(shape, products.chosen(shape, *machines)) for shape in products.shapes(graph)]


def bytes(graph: Graph, config: Config, machine: Architecture) -> int:
    """The most that any one kernel needs: they run one after another."""
    model, b, t = config.model, config.program.batch_size, config.program.seq_len
    heads = model.num_heads + 2 * model.num_kv_heads
    of_products = [products.scratch_bytes(*product) for product in _products(graph, config, machine)]
    head = products.head(graph, config, machine)
    hopper = machine.uses_wgmma(config.program.precision)
    group = model.num_heads // model.num_kv_heads
    items = attention.fused_items(model.head_size, t, group) if hopper else 0
    return max(
        *of_products,
        head.scratch_bytes if head else 0,
        elementwise.scratch_bytes(b * t, model.channels, heads, model.head_size),
        attention.backward_scratch_bytes(b, t, model.num_heads, items),
    )
