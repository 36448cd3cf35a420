"""Matrix products on Hopper (templates/cuda/gemm_sm90.j2)."""

from dataclasses import dataclass

SHARED_LIMIT = 232448  # bytes of a block


@dataclass(frozen=True)
class Tile:
    """How a block computes: see the head of the template."""

    pingpong: bool
    consumers: int  # warpgroups that multiply
    rows: int  # of one consumer
    columns: int
    cluster_m: int = 1
    cluster_n: int = 1
    stages: int = 4
    buffers: int = 1  # of each warp, for its pieces of out

    @property
    def name(self) -> str:
        kind = "Pingpong" if self.pingpong else "Joint"
        return f"{kind}{self.tile_rows}x{self.columns}s{self.stages}b{self.buffers}_{self.cluster_m}x{self.cluster_n}"

    @property
    def tile_rows(self) -> int:
        return self.rows if self.pingpong else self.rows * self.consumers
