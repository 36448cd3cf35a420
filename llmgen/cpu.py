"""What the C target knows of processors: profiles, register tiles, cache blocking, sizes of scratch memory.

Everything is a plain function of integers: what comes out are named constants for the enum of the generated source, which is
rendered for one profile. docs/cpu.md says how the blocking was found.
"""

import math
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llmgen.errors import UserError

FLOAT = 4  # bytes
KiB, MiB = 1 << 10, 1 << 20


@dataclass(frozen=True)
class Profile:
    """A family of processors that one source is rendered for.

    The register tile is tile_rows x (tile_vectors * width) sums. They, tile_vectors registers of the right operand and one
    broadcast of the left must fit the register file: 16 registers up to AVX2, 32 with AVX-512 and NEON. And there must be
    enough independent sums to cover latency x throughput of the multiply-adds (4 x 2 on most cores).
    Cache sizes are those of a typical core, in bytes: they set the blocking, whose plateau is wide.
    """

    name: str
    width: int  # floats in one vector register
    tile_rows: int
    tile_vectors: int
    l1: int
    l2: int
    l3: int

    @property
    def flags(self) -> tuple[str, ...]:
        """What the compiler must be told of the processor."""
        return (f"-march={self.name}",)

    @property
    def tile_columns(self) -> int:
        return self.tile_vectors * self.width


PROFILES = (
    Profile("x86-64-v2", width=4, tile_rows=6, tile_vectors=2, l1=32 * KiB, l2=256 * KiB, l3=8 * MiB),
    Profile("x86-64-v3", width=8, tile_rows=6, tile_vectors=2, l1=32 * KiB, l2=512 * KiB, l3=32 * MiB),
    Profile("x86-64-v4", width=16, tile_rows=8, tile_vectors=3, l1=48 * KiB, l2=1024 * KiB, l3=32 * MiB),
    Profile("armv8-a", width=4, tile_rows=8, tile_vectors=3, l1=64 * KiB, l2=512 * KiB, l3=8 * MiB),
)

# Features of /proc/cpuinfo that make a processor one of a level, best level first (x86-64 psABI, micro-architecture levels).
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
    num_heads: int,
    head_size: int,
    seq_len: int,
    max_seq_len: int,
    rows: int,
    padded_vocab_size: int,
) -> list[tuple[str, int, str]]:
    """The kernels' constants for the enum of the generated source: (name, value, comment) in order.

    linears: (n, c, oc) of every linear layer: rows of tokens, channels in, channels out. The classifier need not be named.
    rows: the tokens of a micro-batch; seq_len those of a sequence in training, max_seq_len the longest that is evaluated.
    """
    chunk = chunk_rows(rows, padded_vocab_size)
    products = []
    for n, c, oc in [*linears, (chunk, num_heads * head_size, padded_vocab_size)]:
        products += [(n, oc, c, False), (n, c, oc, False), (oc, c, n, True)]
    W, MR, NV, NR = profile.width, profile.tile_rows, profile.tile_vectors, profile.tile_columns

    # k: one panel of the right operand fills three quarters of L1, so that it stays while rows of the left go by.
    kc = min(_down(profile.l1 * 3 // 4 // (NR * FLOAT), 8), 512, _up(max(k for _, _, k, _ in products), 8))
    # rows: a block of the left operand fills most of L2.
    mc = min(_down(profile.l2 * 7 // 8 // (kc * FLOAT), MR), _up(max(m for m, _, _, _ in products), MR))
    nc = _up(192, NR)
    # Packed operands share L3 with what else is in use: an eighth of it each.
    most = profile.l3 // 8 // (kc * FLOAT)
    nb = min(_down(most, NR), _up(max(n for _, n, _, _ in products), NR))
    mb = min(_down(most, MR), _up(max(m for m, _, _, packed in products if packed), MR))
    a_panel = _panel(kc * MR)
    b_panel = _panel(kc * NR)
    packed_a, packed_b = mb // MR * a_panel, nb // NR * b_panel

    bq = min(_down(96, math.lcm(MR, W)), _up(seq_len, math.lcm(MR, W)))
    bk = min(_up(128, NR), _up(seq_len, NR))
    return [
        ("W", W, "floats in a vector register"),
        ("MR", MR, "rows of the register tile"),
        ("NV", NV, "vectors in a row of it"),
        ("NR", NR, "columns of it: NV * W"),
        ("KC", kc, f"summed at a time: a panel of KC x NR takes {kc * NR * FLOAT // KiB} KiB of L1"),
        ("MC", mc, f"rows of a block: MC x KC takes {mc * kc * FLOAT // KiB} KiB of L2"),
        ("NC", nc, "columns of out in the unit of work of a thread"),
        ("MB", mb, "rows of the left operand that are packed at a time"),
        ("NB", nb, "columns of the right operand that are packed at a time"),
        ("A_PANEL", a_panel, "floats from one packed panel of MR rows to the next"),
        ("B_PANEL", b_panel, "the same for panels of NR columns"),
        ("STRIP", 16, "panels that are packed side by side"),
        ("PACKED_A", packed_a, "floats of the packed left operand"),
        ("SHARED_SCRATCH", packed_a + packed_b, "floats of both packed operands"),
        ("FEW_ROWS", 16, "up to so many rows, a product reads its weight where it lies"),
        ("TEAM_PRODUCTS", 1 << 18, "multiply-adds that are worth waking the other threads for"),
        ("TEAM_VALUES", 1 << 13, "the same for values that are computed one by one"),
        ("BQ", bq, "queries in a block of attention"),
        ("BK", bk, "keys in it"),
        ("THREAD_SCRATCH", _thread_scratch(MR, NR, bq, bk, head_size, max_seq_len), "floats of a thread, for attention"),
        ("CHUNK", chunk, "rows of logits that exist at a time"),
    ]


def _thread_scratch(MR: int, NR: int, bq: int, bk: int, head_size: int, max_seq_len: int) -> int:
    """Floats of AttentionScratch in templates/c/ops/attention.j2: two blocks of scores, two values for each query, and the
    packed keys, values and channels of a head."""
    key_panels, channel_panels = -(-max_seq_len // NR), -(-head_size // NR)
    keys = key_panels * (head_size * NR + 16)
    channels = channel_panels * (max_seq_len * NR + 16)
    block = channel_panels * (bq * NR + 16)
    return _up(2 * bq * bk + 2 * bq + 2 * keys + channels + 2 * block, 16)


def _panel(floats: int) -> int:
    """Floats from one panel to the next: a cache line more than a multiple of one, so that panels do not share cache sets."""
    return _up(floats, 16) + 16


def _up(x: int, step: int) -> int:
    return -(-x // step) * step


def _down(x: int, step: int) -> int:
    """x rounded down to a multiple of step, but at least one step."""
    return max(step, x // step * step)
