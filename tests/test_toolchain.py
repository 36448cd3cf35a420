"""Finding a compiler, compiling whole or not at all, and not compiling again what has not changed."""

import os
import shlex
import shutil
import subprocess

import pytest

from llmgen import cpu, toolchain
from llmgen.errors import UserError

PROFILE = cpu.resolve("native")
SOURCE = """#include <stdio.h>
int main(void) {
#ifdef _OPENMP
    puts("with OpenMP");
#else
    puts("without OpenMP");
#endif
}
"""


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("CFLAGS", raising=False)
    (tmp_path / "hello.c").write_text(SOURCE)
    return tmp_path / "hello.c"


def build(source) -> toolchain.Build:
    return toolchain.compile(source, source.with_suffix(""), "c", PROFILE)


def script(folder, name: str, body: str):
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def test_the_line_that_is_shown_is_the_line_that_compiles(source):
    result = build(source)
    assert result.program.is_file()
    result.program.unlink()
    subprocess.run(result.line, shell=True, check=True)
    assert subprocess.run([result.program], capture_output=True, text=True).stdout == "with OpenMP\n"
    assert result.notice == ""
    assert sorted(os.listdir(source.parent)) == [".hello.built", "hello", "hello.c"]


def test_what_has_not_changed_is_not_compiled_again(source, monkeypatch):
    def made() -> int:
        return build(source).program.stat().st_ino

    first = made()
    assert made() == first
    source.write_text(SOURCE + "\n")
    second = made()
    assert second != first and made() == second
    monkeypatch.setenv("CFLAGS", "-O1")
    third = made()
    assert third != second and made() == third
    (source.parent / "hello").write_text("something else")
    build(source)
    assert subprocess.run([source.parent / "hello"], capture_output=True).returncode == 0


def test_cc_and_cflags_are_honoured(source, tmp_path, monkeypatch):
    compiler = script(tmp_path, "my cc", 'exec gcc "$@"')
    monkeypatch.setenv("CC", shlex.join([str(compiler), "-DONE=1"]))
    monkeypatch.setenv("CFLAGS", "-DTWO=2 -O0")
    command = build(source).command
    assert command[:2] == (str(compiler), "-DONE=1")
    assert command.index("-O0") > command.index("-O3") and "-DTWO=2" in command


def test_a_compiler_without_openmp_compiles_and_is_named(source, tmp_path, monkeypatch):
    lacks = script(tmp_path, "plain", 'for a; do case $a in *openmp) exit 1;; esac; done; exec gcc "$@"')
    monkeypatch.setenv("CC", str(lacks))
    result = build(source)
    assert "ONE thread" in result.notice and "\n" not in result.notice
    assert subprocess.run([result.program], capture_output=True, text=True).stdout == "without OpenMP\n"


def test_a_failed_compilation_names_the_file_with_the_compilers_words(source):
    build(source)
    before = (source.parent / "hello").read_bytes()
    source.write_text("int main(void) { return nothing; }\n")
    with pytest.raises(UserError) as error:
        build(source)
    log = source.parent / "hello.log"
    assert str(log) in str(error.value) and "\n" not in str(error.value)
    assert "nothing" in log.read_text()
    assert (source.parent / "hello").read_bytes() == before
    assert not (source.parent / ".hello.tmp").exists()


def test_without_a_compiler_the_line_says_how_to_compile_elsewhere(source, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError) as error:
        build(source)
    assert str(source) in str(error.value) and toolchain.compile_line("hello", "c", PROFILE) in str(error.value)
    monkeypatch.setenv("CC", "no-such-cc")
    with pytest.raises(UserError, match="CC=no-such-cc"):
        build(source)


@pytest.mark.skipif(not shutil.which("clang"), reason="no clang")
def test_clang_comes_after_gcc(source, tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    for name in ("clang", "ld", "as"):
        (tmp_path / "bin" / name).symlink_to(os.path.realpath(shutil.which(name)))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert build(source).command[0] == "clang"
