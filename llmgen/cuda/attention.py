"""The CUDA attention kernels: scratch, and which models those for Hopper serve."""

HOPPER_HEAD_SIZES = (64, 128)  # of templates/cuda/ops/attention_sm90.j2
HOPPER_TILE = 64  # queries in a tile there
COUNTERS = 16  # of the work that its blocks take
PART_KEYS = 128  # of a part of the cache, as in templates/cuda/ops/cached_attention.j2


def backward_scratch_bytes(b: int, t: int, num_heads: int) -> int:
    """delta, the sum of dout * out over each row of each head; on Hopper lse beside it, in whole tiles: all float."""
    return b * num_heads * (-(-t // HOPPER_TILE) * HOPPER_TILE) * 2 * 4


def cache_parts(cached_tokens: int) -> int:
    """In how many parts blocks attend to a sequence."""
    return -(-cached_tokens // PART_KEYS)


def cached_scratch_bytes(rows: int, cached_tokens: int, num_heads: int, head_size: int) -> int:
    """What each part finds for each row and head: a sum of values, the largest score, the sum of probabilities; all float."""
    return rows * num_heads * cache_parts(cached_tokens) * (head_size + 2) * 4
