"""`llmgen bench` on a tiny config: every op and every comparison gets its line."""

import importlib.util
import os
import shutil

import pytest
from command import fails, succeeds

from llmgen.cuda import architecture

TINY = ["--config", "gpt2-nano", "--batch-size", "2", "--seq-len", "16", "--set", "num_layers=2", "--set", "channels=32"]
QUICK = ["--steps", "2", "--rounds", "1"]
needs_gcc = pytest.mark.skipif(not shutil.which("gcc"), reason="gcc is not installed")


@needs_gcc
def test_it_times_every_op_of_a_step(tmp_path):
    lines = succeeds("bench", *TINY, *QUICK, cwd=tmp_path)
    assert "2 x 16 tokens" in lines[0] and "GFLOP/s" in lines[1]
    named = {line.split()[0] for line in lines[4:]}
    assert {"layernorm_forward", "linear_gelu_forward", "attention_backward", "classifier_forward_backward"} <= named
    assert lines[-1].startswith("the step")


@needs_gcc
@pytest.mark.skipif(not importlib.util.find_spec("torch"), reason="torch is not installed")
def test_it_comparesproducts_attention_and_whole_steps_with_pytorch(tmp_path):
    text = "\n".join(succeeds("bench", "--against", "torch", *TINY, *QUICK, cwd=tmp_path))
    for line in ("linear_backward_weight 32 x 32 x 96", "backward 2 x 4 x 16 x 8", "ours ", "PyTorch, 384 tokens"):
        assert f"\n{line}" in text, line


def test_without_pytorch_one_line_says_what_to_install(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    assert "pip install torch" in fails(1, "bench", "--against", "torch", *TINY, cwd=tmp_path, env={"PYTHONPATH": path})


@pytest.mark.skipif(architecture.present() is not None, reason="there is a GPU")
def test_without_a_gpu_the_cuda_program_is_not_timed(tmp_path):
    assert "needs an NVIDIA GPU" in fails(1, "bench", "--target", "cuda", cwd=tmp_path)
    assert "bench --energy needs an NVIDIA GPU" in fails(1, "bench", "--target", "cuda", "--energy", cwd=tmp_path)


def test_energy_is_of_a_gpu(tmp_path):
    assert "add --target cuda" in fails(1, "bench", "--energy", cwd=tmp_path)
