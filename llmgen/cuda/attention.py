"""The CUDA attention kernels: scratch, and which models those for Hopper serve."""

HOPPER_HEAD_SIZES = (64, 128)  # of templates/cuda/ops/attention_sm90.j2
HOPPER_TILE = 64  # queries in a tile there
COUNTERS = 16  # of the work that its blocks take


def forward_scratch_bytes() -> int:
    return 0


def backward_scratch_bytes(b: int, t: int, num_heads: int) -> int:
    """delta, the sum of dout * out over each row of each head; on Hopper lse beside it, in whole tiles: all float."""
    return b * num_heads * (-(-t // HOPPER_TILE) * HOPPER_TILE) * 2 * 4
