#!/usr/bin/env bash
# Trains a small model on Python's own sources, byte by byte, and lets it write: examples/generate.sh [STEPS]
# Then the same with no Python at all: one C file, compiled by the line at its top.
set -euo pipefail
steps="${1:-1000}"

llmgen run --out writer -- --steps "$steps"

llmgen generate --model writer/model.bin --prompt 'def main(' --prompt 'class ' --tokens 200 --temperature 0.7 --top-k 40

llmgen build --config writer/model.bin --generate --no-compile --out writer >/dev/null
cd writer
eval "$(sed -n 's/^ \* Compile:  //p' generate_gpt2.c)"
./generate_gpt2 --load model.bin --prompt 'import ' --tokens 200 --temperature 0.7 --top-p 0.9
