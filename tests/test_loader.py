"""The loader of the generated program by itself: many shards, long files, and how long it takes."""

import subprocess
from pathlib import Path

import numpy as np
import pytest

from llmgen import config as configs
from llmgen import plan, render
from llmgen.formats import tokens

B, T = 2, 5
BT = B * T
V = 200_000  # so that each token can be another one
HARNESS = """
#undef main
/* Prints the shard's tokens of the k-th training samples from first to last, a line each. */
int main(int argc, char **argv) {
    static Settings s;
    (void)argc;
    s.shuffle = atoi(argv[2]);
    s.seed = atoi(argv[3]);
    s.total_batch_size = BT;
    Loader data = open_data("--train-data", argv[1]);
    const int64_t first = atoll(argv[4]), last = atoll(argv[5]);
    printf("%lld samples, an epoch of %d steps\\n", (long long)data.num_samples, steps_of_an_epoch(&s, &data));
    const double start = seconds();
    for (int64_t k = first; k < last; k++) {
        const int *tokens = load_sample(&data, training_sample(&s, &data, k));
        prefetch_sample(&data, training_sample(&s, &data, k + 1));
        if (argv[6]) continue;
        for (int i = 0; i <= BT; i++) printf("%d ", tokens[i]);
        printf("\\n");
    }
    printf("%.3f us each\\n", 1e6 * (seconds() - start) / (double)(last - first));
    return 0;
}
"""


@pytest.fixture(scope="module")
def loader(tmp_path_factory):
    """Runs the loader; returns its lines."""
    folder = tmp_path_factory.mktemp("loader")
    overrides = {"num_layers": 1, "num_heads": 1, "channels": 8, "vocab_size": V, "batch_size": B, "seq_len": T}
    source = render.source(plan.make(configs.load("gpt2-nano", overrides=overrides), "c", "x86-64-v2"))
    (folder / "loader.c").write_text("#define main trainer\n" + source + HARNESS)
    subprocess.run(["gcc", "-std=gnu11", "-O1", "-w", "loader.c", "-lm", "-o", "loader"], cwd=folder, check=True)

    def loader(pattern, shuffle: int, seed: int, first: int, last: int, *more) -> list[str]:
        command = [str(word) for word in (folder / "loader", pattern, shuffle, seed, first, last, *more)]
        return subprocess.run(command, capture_output=True, check=True, text=True).stdout.splitlines()

    return loader


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> tuple[Path, np.ndarray]:
    """1,000 shards of different lengths, in both widths, with no token twice; and those tokens that samples begin with."""
    folder = tmp_path_factory.mktemp("many")
    pick, ids, inputs = np.random.default_rng(0), iter(range(V)), []
    for i in range(1000):
        count = int(pick.integers(BT + 1, 150))
        shard = np.fromiter((next(ids) for _ in range(count)), np.uint32)
        wide = shard.max() >= 1 << 16
        dtype = np.dtype("<u4" if wide else "<u2")
        (folder / f"train_{i:06d}.bin").write_bytes(tokens.header(count, dtype) + shard.astype(dtype).tobytes())
        inputs.append(shard[: (count - 1) // BT * BT])
    return folder, np.concatenate(inputs)


def read(lines: list[str]) -> np.ndarray:
    return np.array([line.split() for line in lines[2:-1]], int)


def test_of_1000_shards_each_token_comes_once_an_epoch(loader, many):
    folder, inputs = many
    n = len(inputs) // BT
    orders = []
    for shuffle, seed, epoch in ((0, 1, 0), (1, 1, 0), (1, 1, 1), (1, 2, 0)):
        lines = loader(folder / "train_*.bin", shuffle, seed, epoch * n, epoch * n + n)
        assert lines[0].startswith("train-data: 1000 files, ") and lines[1] == f"{n} samples, an epoch of {n} steps"
        samples = read(lines)
        assert (np.sort(samples[:, :-1].ravel()) == inputs).all()
        assert (samples[:, 1:] == samples[:, :-1] + 1).all(), "a sample is of one shard, and its targets follow"
        orders.append(samples[:, 0])
    assert (orders[0] == inputs[::BT]).all(), "without shuffling in the order of the files"
    for i, order in enumerate(orders[1:], 1):
        assert all((order != other).mean() > 0.9 for other in orders[:i])
        jumps = np.abs(np.diff(order))
        assert np.median(jumps) > 0.1 * inputs[-1], "across the shards as well as within"


def test_the_loader_does_not_show_in_a_step(loader, many):
    folder, inputs = many
    lines = loader(folder / "train_*.bin", 1, 1, 0, len(inputs) // BT, "quiet")
    assert float(lines[-1].split()[0]) < 1000, "microseconds, a new file each time"


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_files_over_2_gb_and_more_than_2_to_the_31_tokens(loader, tmp_path, dtype):
    """Sparse files, with marks where sums of 32 bits would go wrong."""
    dtype = np.dtype(dtype)
    count = 1_500_000_001  # 3 or 6 GB
    n = (count - 1) // BT
    path = tmp_path / "a.bin"
    marks = [0, n // 2, 107_374_183, n - 1]  # the third begins beyond 2^31 bytes in either width
    with open(path, "wb") as file:
        file.write(tokens.header(count, dtype))
        for mark in marks:
            file.seek(1024 + mark * BT * dtype.itemsize)
            file.write(np.arange(mark % 1000, mark % 1000 + BT + 1).astype(dtype).tobytes())
        file.truncate(1024 + count * dtype.itemsize)
    for name in ("b.bin", "c.bin"):
        (tmp_path / name).symlink_to(path)
    assert 3 * count > 2**32
    for shard in range(3):
        for mark in marks:
            at = shard * n + mark
            lines = loader(tmp_path / "*.bin", 0, 0, at, at + 1)
            assert read(lines)[0].tolist() == list(range(mark % 1000, mark % 1000 + BT + 1))
    assert lines[0] == (
        f"train-data: 3 files, {3 * count} tokens, {3 * n} samples of {B} x {T}; 3 tokens at the ends of files are left out"
    )
    assert lines[1] == f"{3 * n} samples, an epoch of {3 * n} steps"
    assert len(set(read(loader(tmp_path / "*.bin", 1, 7, 0, 50))[:, 0])) >= 1
