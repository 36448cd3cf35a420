"""What the C target knows of processors: profiles, register tiles, cache blocking, sizes of scratch memory.

Everything is a plain function of integers: what comes out are named constants for the enum of the generated source,
which is rendered for one profile. docs/cpu.md says how the blocking was found.
"""

import math
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llmgen.errors import UserError

FLOAT = 4  # bytes
KiB = 1 << 10


@dataclass(frozen=True)
class Profile:
    """A family of processors that one source is rendered for.

    The register tile is tile_rows x (tile_vectors * width) sums. They, tile_vectors registers of the right operand and
    one broadcast of the left must fit the register file: 16 registers up to AVX2, 32 with AVX-512 and NEON. And there
    must be enough independent sums to cover latency x throughput of the multiply-adds (4 x 2 on most cores).
    depth is how many k a product sums at a time, as measured: the wider the registers, the longer a sum must be to pay
    for its beginning and end. l2: the second cache of a typical core, in bytes.
    """

    name: str
    width: int  # floats in one vector register
    tile_rows: int
    tile_vectors: int
    depth: int
    l2: int

    @property
    def flags(self) -> tuple[str, ...]:
        """What the compiler must be told of the processor."""
        return (f"-march={self.name}",)

    @property
    def tile_columns(self) -> int:
        return self.tile_vectors * self.width


PROFILES = (
    Profile("x86-64-v2", width=4, tile_rows=6, tile_vectors=2, depth=512, l2=256 * KiB),
    Profile("x86-64-v3", width=8, tile_rows=6, tile_vectors=2, depth=512, l2=512 * KiB),
    Profile("x86-64-v4", width=16, tile_rows=6, tile_vectors=4, depth=768, l2=1024 * KiB),
    Profile("armv8-a", width=4, tile_rows=8, tile_vectors=3, depth=512, l2=512 * KiB),
)

# Features of /proc/cpuinfo that make a processor one of a level, best level first (x86-64 psABI, "levels").
_X86_LEVELS = (
    ("x86-64-v4", {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}),
    ("x86-64-v3", {"avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"}),
    ("x86-64-v2", {"sse4_2", "ssse3", "popcnt"}),
)


def resolve(name: str = "native") -> Profile:
    """The profile of that name; "native" is the nearest one to this machine. Raises UserError for an unknown name."""
    if name == "native":
        name = _native()
    for profile in PROFILES:
        if profile.name == name:
            return profile
    names = ", ".join(profile.name for profile in PROFILES)
    raise UserError(f"unknown processor '{name}': choose native or one of {names}")


def _native(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    if platform.machine().lower() in ("aarch64", "arm64"):
        return "armv8-a"
    features = set()
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("flags"):
                features = set(line.split(":", 1)[1].split())
                break
    for name, needed in _X86_LEVELS:
        if needed <= features:
            return name
    # Without /proc/cpuinfo (macOS) nothing is known: every Mac that still gets updates has AVX2.
    return "x86-64-v3" if platform.system() == "Darwin" else "x86-64-v2"


def chunk_rows(rows: int, padded_vocab_size: int) -> int:
    """Rows of logits that the classifier holds at a time, of `rows` at most.

    The classifier's weight and its gradient are streamed once for each chunk, so chunks should be long; the logits take
    rows * padded_vocab_size floats, so they should not: about 2^24 logits (64 MiB), but at least 64 rows.
    """
    most = max(64, (1 << 24) // padded_vocab_size)
    parts = -(-rows // most)
    return -(-rows // parts)


def constants(
    profile: Profile,
    *,
    linears: Sequence[tuple[int, int, int]],
    channels: int,
    head_size: int,
    seq_len: int,
    max_seq_len: int,
    rows: int,
    padded_vocab_size: int,
) -> list[tuple[str, int, str]]:
    """The kernels' constants for the enum of the generated source: (name, value, comment) in order.

    linears: (n, c, oc) of every linear layer: rows of tokens, channels in, channels out. The classifier's is added.
    rows: the tokens of a micro-batch; seq_len those of a sequence in training, max_seq_len of the longest evaluated.
    """
    chunk = chunk_rows(rows, padded_vocab_size)
    products, packed_a, packed_b = _products(profile, [*linears, (chunk, channels, padded_vocab_size)])
    MR, W, NR = profile.tile_rows, profile.width, profile.tile_columns
    bq = min(_down(96, math.lcm(MR, W)), _up(seq_len, math.lcm(MR, W)))
    bk = min(_up(128, NR), _up(seq_len, NR))
    attention = _attention_scratch(MR, NR, bq, bk, head_size, max_seq_len)
    return [
        *products,
        ("BQ", bq, "queries in a block of attention"),
        ("BK", bk, "keys in it"),
        ("THREAD_SCRATCH", max(packed_a + packed_b, attention), "floats of a thread: packed operands, or attention's"),
        ("CHUNK", chunk, "rows of logits that exist at a time"),
    ]


def generation_constants(
    profile: Profile, *, linears: Sequence[tuple[int, int, int]], cached_tokens: int
) -> list[tuple[str, int, str]]:
    """The same for the program that generates: its products all go forward. cached_tokens: room of a sequence in the cache."""
    products, _, packed = _products(profile, linears)
    both = ("KC_BOTH", "NC_BOTH", "A_PANEL", "PACKED_A")  # of products that pack both operands
    queries = 4
    return [
        *(row for row in products if row[0] not in both),
        ("QUERIES", queries, "tokens that attention answers together"),
        ("THREAD_SCRATCH", max(packed, queries * cached_tokens), "floats of a thread: packed operands, or attention's scores"),
    ]


def _products(profile: Profile, linears: Sequence[tuple[int, int, int]]) -> tuple[list[tuple[str, int, str]], int, int]:
    """The constants of the matrix products, and the floats that a thread packs of the left and the right operand."""
    longest = max(max(c, oc) for _, c, oc in linears)
    tokens = max(n for n, _, _ in linears)
    W, MR, NV, NR = profile.width, profile.tile_rows, profile.tile_vectors, profile.tile_columns

    # Forward and input gradient: the left operand, rows of tokens, is read where it lies. A strip of the right one
    # fills three quarters of L2.
    kc = min(profile.depth, _up(longest, 8))
    nc = min(_down(profile.l2 * 3 // 4 // (kc * FLOAT), NR), _up(longest, NR))
    # Weight gradient: the sum runs over the tokens, and both operands are packed, the left one for each strip again: so
    # strips are wide, and sums shorter in return.
    kc_both, nc_both = min(256, _up(tokens, 8)), min(_up(768, NR), _up(longest, NR))
    mc = min(_down(256, MR), _up(max(tokens, longest), MR))
    a_panel = _panel(kc_both * MR)
    packed_a = mc // MR * a_panel
    packed_b = max(nc // NR * _panel(kc * NR), nc_both // NR * _panel(kc_both * NR))

    rows = [
        ("W", W, "floats in a vector register"),
        ("MR", MR, "rows of the register tile"),
        ("NV", NV, "vectors in a row of it"),
        ("NR", NR, "columns of it: NV * W"),
        ("KC", kc, f"summed at a time: MR rows of the left operand take {MR * kc * FLOAT // KiB} KiB of L1"),
        ("NC", nc, f"columns packed at a time: KC x NC takes {kc * nc * FLOAT // KiB} KiB of L2"),
        ("MC", mc, "rows of a block of out"),
        ("KC_BOTH", kc_both, "the same as KC where both operands are packed"),
        ("NC_BOTH", nc_both, "the same as NC there"),
        ("A_PANEL", a_panel, "floats from one packed panel of MR rows to the next"),
        ("PACKED_A", packed_a, "floats of the packed left operand; those of the right one follow"),
        ("SHORT_PANEL", 8 * KiB, "floats of a panel that stays in L1 while the rows go by"),
        ("PACKING", 32, "packing one value takes as long as so many multiply-adds"),
        ("FEW_ROWS", 16, "up to so many rows, a product reads its weight where it lies"),
        ("TEAM_PRODUCTS", 1 << 18, "multiply-adds that are worth waking the other threads for"),
        ("TEAM_VALUES", 1 << 13, "the same for values that are computed one by one"),
    ]
    return rows, packed_a, packed_b


def _attention_scratch(MR: int, NR: int, bq: int, bk: int, head_size: int, max_seq_len: int) -> int:
    """Floats of AttentionScratch in templates/c/ops/attention.j2: two blocks of scores, two values for each query, and
    the packed keys, values and channels of a head."""
    key_panels, channel_panels = -(-max_seq_len // NR), -(-head_size // NR)
    keys = key_panels * (head_size * NR + 16)
    channels = channel_panels * (max_seq_len * NR + 16)
    block = channel_panels * (bq * NR + 16)
    return _up(2 * bq * bk + 2 * bq + 2 * keys + channels + 2 * block, 16)


def _panel(floats: int) -> int:
    """Floats from one panel to the next: one cache line more than it holds, so that panels do not share cache sets."""
    return _up(floats, 16) + 16


def _up(x: int, step: int) -> int:
    return -(-x // step) * step


def _down(x: int, step: int) -> int:
    """x rounded down to a multiple of step, but at least one step."""
    return max(step, x // step * step)
