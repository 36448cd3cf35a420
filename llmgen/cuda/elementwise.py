"""Bytes of scratch memory that the CUDA kernels outside of products and attention need."""

PARTIAL_BLOCKS, PARTIALS = 1024, 3  # as in templates/cuda/reduce.j2
SORT_THREADS, BINS, SPAN = 1024, 256, 64  # as in templates/cuda/ops/token_embedding.j2
NORM_PARTS = 1024  # as in templates/cuda/ops/global_norm.j2


def norm_scratch(n: int, c: int) -> int:
    """layernorm_backward and rmsnorm_backward: the sums of each block over its rows."""
    return 4 * PARTIALS * min(n, PARTIAL_BLOCKS) * c


def qk_norm_scratch(n: int, heads: int, head_size: int) -> int:
    """qk_norm_backward, with `heads` of queries, keys and values in a row: the same, where a block has 8 heads or more."""
    return 4 * PARTIALS * min(-(-n * heads // 8), PARTIAL_BLOCKS) * head_size


def token_embedding_scratch(n: int, c: int) -> int:
    """token_embedding_backward: the order of the tokens twice, counts for sorting, and two parts of sums for each span."""
    return 4 * (2 * (-(-n // 64) * 64) + -(-n // SORT_THREADS) * BINS + 2 * -(-n // SPAN) * c)


def global_norm_scratch() -> int:
    """global_norm, and the squared norm that Muon keeps behind its parts."""
    return 8 * (NORM_PARTS + 1)


def scratch_bytes(n: int, c: int, heads: int, head_size: int) -> int:
    """The most that any of them needs for n tokens of c channels, with `heads` of queries, keys and values."""
    needs = norm_scratch(n, c), qk_norm_scratch(n, heads, head_size), token_embedding_scratch(n, c), global_norm_scratch()
    return max(needs)
