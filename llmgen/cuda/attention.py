"""The CUDA attention kernels: scratch, and which models those for Hopper serve."""

HOPPER_HEAD_SIZES = (64, 128)  # of templates/cuda/ops/attention_sm90.j2
HOPPER_TILE = 64  # queries in a tile there
KEY_TILES = 2  # of an item of its backward
FUSED_HEAD_SIZE, FUSED_TOKENS = 64, 1024  # where one kernel makes all gradients faster
FUSED_ITEMS = 528  # there, of so many heads that they have about so many items, all are handed out together
COUNTERS = 16  # of the work that its blocks take
PART_KEYS = 128  # of a part of the cache, as in templates/cuda/ops/cached_attention.j2


def fused_items(head_size: int, t: int, group: int) -> int:
    """On Hopper: FUSED_ITEMS where one kernel makes all gradients, 0 where one makes dQ, another dK and dV.

    The one needs five products and not seven, and adds up the parts of dQ in memory, in order. In long sequences, whose items
    run at the same time, they would wait for each other; and where a `group` of heads shares keys, too many parts would be
    under way for the L2 cache.
    """
    return FUSED_ITEMS if head_size == FUSED_HEAD_SIZE and t <= FUSED_TOKENS and group == 1 else 0


def backward_scratch_bytes(b: int, t: int, num_heads: int, items: int = 0) -> int:
    """delta, the sum of dout * out over each row of each head; on Hopper lse beside it, in whole tiles: all float.

    items: `fused_items`; with some, dQ is added up beside them, float too, of the heads handed out together, with a counter
    for each tile.
    """
    tiles = -(-t // HOPPER_TILE)
    together = max(1, items // -(-tiles // KEY_TILES))
    parts = min(b * num_heads, together) * tiles if items else 0
    return 4 * (b * num_heads * tiles * 2 * HOPPER_TILE + parts * (HOPPER_TILE * FUSED_HEAD_SIZE + 1))


def cache_parts(cached_tokens: int) -> int:
    """In how many parts blocks attend to a sequence."""
    return -(-cached_tokens // PART_KEYS)


def cached_scratch_bytes(rows: int, cached_tokens: int, num_heads: int, head_size: int) -> int:
    """What each part finds for each row and head: a sum of values, the largest score, the sum of probabilities; all float."""
    return rows * num_heads * cache_parts(cached_tokens) * (head_size + 2) * 4
