"""Scratch of the CUDA attention kernels."""


def forward_scratch_bytes() -> int:
    return 0


def backward_scratch_bytes(b: int, t: int, num_heads: int) -> int:
    """delta, the sum of dout * out over each row of each head: (b, num_heads, t) float."""
    return b * num_heads * t * 4
