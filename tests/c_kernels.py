"""Renders the kernel templates alone into a shared library, so that every function can be called with numpy arrays."""

import hashlib
import subprocess
from dataclasses import dataclass
from pathlib import Path

from llmgen import config, cpu, harness

SIGNATURES = {
    "token_embedding_forward": "out tokens wte n c",
    "token_embedding_backward": "dwte dout tokens rows n c accumulate",
    "position_embedding_forward": "out inp wpe b t c",
    "position_embedding_backward": "dwpe dout rows b t c accumulate",
    "layernorm_forward": "out mean rstd inp weight bias n c",
    "layernorm_backward": "dinp dweight dbias dout inp mean rstd weight addend n c accumulate",
    "linear_forward": "out inp weight bias addend n c oc",
    "linear_gelu_forward": "out pre inp weight bias n c oc",
    "linear_backward_input": "dinp dout weight n c oc",
    "linear_backward_input_gelu": "dinp dout weight pre n c oc",
    "linear_backward_weight": "dweight dbias dout inp n c oc accumulate",
    "gelu_forward": "out inp size",
    "gelu_backward": "dinp dout inp size",
    "add_forward": "out inp addend size",
    "attention_forward": "out lse qkv b t",
    "attention_backward": "dqkv dout out lse qkv b t",
    "classifier_forward": "losses logits inp weight targets n",
    "classifier_forward_backward": "losses dinp dweight logits inp weight targets loss_scale n accumulate",
    "sum_of_squares": "x size",
    "adamw_update": "param m v grad size grad_scale learning_rate weight_decay beta1 beta2 epsilon step",
}
OPS = ["token_embedding", "position_embedding", "layernorm", "linear", "add", "attention", "classifier", "global_norm", "adamw"]
MATH = ("vexp", "vlog", "vtanh", "vsqrt", "vgelu", "vgelu_grad")


@dataclass(frozen=True)
class Sizes:
    """What a kernel needs at compile time."""

    batch: int = 2
    seq_len: int = 16
    num_heads: int = 2
    head_size: int = 8
    vocab_size: int = 50
    max_seq_len: int = 0  # 0: seq_len
    chunk: int = 0  # 0: as the generator chooses

    @property
    def channels(self) -> int:
        return self.num_heads * self.head_size

    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // 128) * 128


def source(sizes: Sizes, profile: cpu.Profile, overrides: dict[str, int] | None = None) -> str:
    """The C of all kernels, with an exported harness_NAME around each."""
    s, c, rows = sizes, sizes.channels, sizes.batch * sizes.seq_len
    longest = s.max_seq_len or s.seq_len
    fixed = {
        "NH": s.num_heads,
        "HS": s.head_size,
        "C": c,
        "V": s.vocab_size,
        "VP": s.padded_vocab_size,
        "MAXT": longest,
    }
    blocking = cpu.constants(
        profile,
        linears=[(rows, c, 3 * c), (rows, c, c), (rows, c, 4 * c), (rows, 4 * c, c)],
        channels=c,
        head_size=s.head_size,
        seq_len=s.seq_len,
        max_seq_len=longest,
        rows=rows,
        padded_vocab_size=s.padded_vocab_size,
    )
    values = {**fixed, **{name: value for name, value, _ in blocking}, **({"CHUNK": s.chunk} if s.chunk else {})}
    values.update(overrides or {})
    model = config.ModelConfig(1, s.num_heads, c, s.vocab_size, longest, s.num_heads, s.head_size, 4 * c)
    return harness.source(values, model, OPS, SIGNATURES, MATH)


def compile_source(text: str, folder: Path, compiler: str, flags: list[str]) -> Path:
    """Compiles to a shared library named by its content; warnings are errors."""
    key = hashlib.sha256(" ".join([compiler, *flags, text]).encode()).hexdigest()[:16]
    path, library = folder / f"{key}.c", folder / f"{key}.so"
    if not library.exists():
        path.write_text(text)
        strict = ["-Wall", "-Wextra", "-Wpedantic", "-Werror"]
        link = [flag for flag in flags if flag != "-Ofast"]  # which at linking would change how this process computes
        for command in (
            [compiler, *flags, *strict, "-fPIC", "-c", str(path), "-o", f"{library}.o"],
            [compiler, *link, "-shared", f"{library}.o", "-lm", "-o", str(library)],
        ):
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[:4000]}"
    return library


def load(library: Path, threads: int) -> harness.Library:
    return harness.Library(library, SIGNATURES, threads)
