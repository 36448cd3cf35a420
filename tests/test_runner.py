"""Following a program: plain lines in a pipe, a live view on a terminal, signals passed on once, its exit status."""

import os
import pty
import select
import signal
import subprocess
import sys
import time

import pytest

from llmgen import runner
from llmgen.errors import UserError

RUN = "import sys; from llmgen import runner; sys.exit(runner.run(sys.argv[1], sys.argv[2:]))"

# counts the signals that reach it, and prints what a generated program prints
PROGRAM = """#!{python}
import signal, sys, time
seen = []
signal.signal(signal.SIGINT, lambda n, f: seen.append(n))
signal.signal(signal.SIGTERM, lambda n, f: seen.append(n))
print("memory: 10 bytes", flush=True)
for i in range(1, 4):
    print(f"step {{i}}/3 | loss {{4 - i}}.000000 | norm 1.0000 | lr 1.00e-03 | 2.0 ms | 1234 tok/s", flush=True)
print("val loss 1.500000", flush=True)
print("sample at step 3:\\ndef f(x):\\n", flush=True)
if "wait" in sys.argv:
    end = time.time() + 20
    while not seen and time.time() < end:
        time.sleep(0.01)
    time.sleep(0.5)
    print("signals:", len(seen), flush=True)
    sys.exit(128 + seen[0])
sys.exit(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
"""


@pytest.fixture
def program(tmp_path):
    path = tmp_path / "train_fake"
    path.write_text(PROGRAM.format(python=sys.executable))
    path.chmod(0o755)
    return path


def start(program, *flags, **more) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", RUN, program, *flags], start_new_session=True, **more)


def test_in_a_pipe_the_programs_own_lines_pass_and_its_status_is_returned(program):
    process = start(program, "7", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 7 and err == b""
    assert out == subprocess.run([program], capture_output=True).stdout


@pytest.mark.parametrize("group", [False, True], ids=["the command alone", "the whole group"])
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_reaches_the_program_once_and_is_waited_for(program, number, status, group):
    process = start(program, "wait", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not process.stdout.readline().startswith(b"sample"):
        assert process.poll() is None
    time.sleep(0.2)
    (os.killpg if group else os.kill)(process.pid, number)
    out, err = process.communicate(timeout=20)
    assert process.returncode == status and err == b""
    assert out.endswith(b"signals: 1\n")


def on_a_terminal(program, *flags, ctrl_c_after: bytes = b"") -> tuple[str, int]:
    """What a terminal shows, and the exit status."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, "-c", RUN, str(program), *flags])
    shown, end = b"", time.time() + 20
    while time.time() < end:
        if not select.select([terminal], [], [], 0.1)[0]:
            continue
        try:
            chunk = os.read(terminal, 4096)
        except OSError:
            break
        if not chunk:
            break
        shown += chunk
        if ctrl_c_after and ctrl_c_after in shown:
            time.sleep(0.2)
            os.write(terminal, b"\x03")
            ctrl_c_after = b""
    os.close(terminal)
    return shown.decode(), os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_on_a_terminal_one_line_moves_and_the_rest_stays(program):
    shown, status = on_a_terminal(program)
    assert status == 0
    assert "step 3/3" not in shown
    assert "3/3 | loss 1.000000 | val loss 1.500000 | 1,234 tok/s" in shown and "left" in shown and "###" in shown
    assert "memory: 10 bytes\r\n" in shown and "def f(x):\r\n" in shown


def test_the_live_view_draws_the_losses_where_there_is_room():
    progress = runner._Progress()
    for step in range(1, 5001):
        progress.update(step, 5000, f"{5000 - step}.5", 100.0)
    assert len(progress.losses) < 4 * runner.SPARKS, "however long the run is"
    assert progress.line(200).endswith(" | " + progress.line(200)[-runner.SPARKS :])
    blocks = progress.line(200)[-runner.SPARKS :]
    assert blocks[0] == "█" and blocks[-1] == "▁" and list(blocks) == sorted(blocks, reverse=True)
    for width in (40, 60, 80, 100):
        assert len(progress.line(width)) < width


def test_ctrl_c_on_a_terminal_reaches_the_program_once(program):
    shown, status = on_a_terminal(program, "wait", ctrl_c_after=b"def f(x)")
    assert status == 130
    assert "signals: 1" in shown


def test_a_program_that_is_not_there_or_crashes_is_one_line(tmp_path, program):
    with pytest.raises(UserError, match="cannot be started: No such file"):
        runner.run(tmp_path / "nothing", [])
    program.write_text("#!/bin/sh\nkill -SEGV $$\n")
    with pytest.raises(UserError, match="SIGSEGV"):
        runner.run(program, [])
    program.write_text("#!/bin/sh\nkill -KILL $$\n")
    with pytest.raises(UserError, match="memory"):
        runner.run(program, [])


def test_waiting_threads_spin_briefly_unless_the_user_says_how_they_wait(monkeypatch):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    assert runner.environment()["GOMP_SPINCOUNT"] == "1000"
    monkeypatch.setenv("GOMP_SPINCOUNT", "5")
    assert runner.environment()["GOMP_SPINCOUNT"] == "5"
    monkeypatch.delenv("GOMP_SPINCOUNT")
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    assert "GOMP_SPINCOUNT" not in runner.environment()
