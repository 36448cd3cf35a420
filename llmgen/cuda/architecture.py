"""GPU architectures: what --arch names, what nvcc is told, and what the kernels are cut for."""

import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field

from llmgen.errors import UserError

DEFAULT = "sm_80"
# name -> multiprocessors of the usual card of that architecture: products are split until so many are busy
MULTIPROCESSORS = {
    "sm_60": 56,
    "sm_61": 28,
    "sm_70": 80,
    "sm_75": 40,
    "sm_80": 108,
    "sm_86": 82,
    "sm_87": 16,
    "sm_89": 128,
    "sm_90": 132,
    "sm_90a": 132,
    "sm_100": 148,
    "sm_103": 148,
    "sm_120": 170,
    "sm_121": 48,
}


@dataclass(frozen=True)
class Architecture:
    """The architectures that one source is written for; `names[0]` is what it is tuned for.

    tuned: with --tuned, the kernels that were fastest here: (function, c, oc) -> [(n, choice)], see tuned.py.
    """

    names: tuple[str, ...]
    tuned: Mapping = field(default_factory=dict, hash=False)

    @property
    def name(self) -> str:
        return ",".join(self.names)

    @property
    def is_hopper(self) -> bool:
        """Whether the source uses what only sm_90a has: wgmma and the tensor memory accelerator."""
        return self.names == ("sm_90a",)

    def uses_wgmma(self, precision: str) -> bool:
        """Whether products and attention are Hopper's: in float32 they are the portable ones."""
        return self.is_hopper and precision == "bf16"

    @property
    def multiprocessors(self) -> int:
        return MULTIPROCESSORS[self.names[0]]

    @property
    def least(self) -> int:
        """The lowest compute capability, as __CUDA_ARCH__ has it: 800 for sm_80."""
        return 10 * min(capability(name) for name in self.names)

    @property
    def flags(self) -> tuple[str, ...]:
        """For nvcc."""
        if len(self.names) == 1 and not self.is_hopper:
            return (f"-arch={self.names[0]}",)
        numbers = [name.removeprefix("sm_") for name in self.names]
        return tuple(f"-gencode=arch=compute_{n},code=sm_{n}" for n in numbers)


def capability(name: str) -> int:
    """80 for sm_80, 90 for sm_90a."""
    return int(re.sub(r"\D", "", name))


def resolve(arch: str | Architecture | None, precision: str) -> Architecture:
    """The architecture that --arch names; without it that of the GPU that is present, else sm_80. Raises UserError.

    What is resolved already stays as it is.
    """
    if isinstance(arch, Architecture):
        return arch
    names = tuple(dict.fromkeys(part.strip() for part in arch.split(","))) if arch else (present() or DEFAULT,)
    for name in names:
        if name not in MULTIPROCESSORS:
            raise UserError(f"--arch {name} is not known; use one of: {', '.join(MULTIPROCESSORS)}")
        if precision == "bf16" and capability(name) < 80:
            raise UserError(f"--arch {name} has no bfloat16 tensor cores; use --precision fp32, or sm_80 and later")
    if "sm_90a" in names and len(names) > 1:
        raise UserError("--arch sm_90a stands alone: its source uses what only Hopper has; use sm_90 for one that others share")
    return Architecture(names)


def portable(arch: str | None, precision: str) -> Architecture:
    """The same for a source without Hopper's own kernels: sm_90 in place of sm_90a. Raises UserError."""
    found = resolve(arch, precision)
    return Architecture(("sm_90",)) if found.is_hopper else found


def present() -> str | None:
    """The architecture of the first GPU here, or None."""
    found = re.match(r"(\d+)\.(\d+)", _asked("compute_cap"))
    if not found:
        return None
    name = f"sm_{found[1]}{found[2]}"
    if name == "sm_90":
        return "sm_90a"
    return name if name in MULTIPROCESSORS else None


def gpu_name() -> str | None:
    """The name of the first GPU here, as in NVIDIA H100 80GB HBM3, or None."""
    return _asked("name") or None


def _asked(field: str) -> str:
    """What nvidia-smi says of the first GPU; empty if there is none."""
    if not shutil.which("nvidia-smi"):
        return ""
    result = subprocess.run(["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"], capture_output=True, text=True)
    return result.stdout.strip().split("\n")[0].strip() if result.returncode == 0 else ""
