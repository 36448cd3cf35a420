#!/usr/bin/env bash
# A run that is stopped goes on to the same bits: examples/resume.sh [STEPS]
# Trains a small model on Python's own sources, once in one go (./whole) and once stopped on the way and resumed (./parts).
set -euo pipefail
steps="${1:-1000}"

llmgen run --out whole -- --steps "$steps"

: >parts.log  # there, and nothing of an earlier run in it, before it is read
llmgen run --out parts -- --steps "$steps" --checkpoint-every 50 --checkpoint-keep 2 >>parts.log &
until grep -q '^saved checkpoint 50 ' parts.log || ! kill -0 $! 2>/dev/null; do sleep 0.1; done
kill -TERM $! && wait $! || echo "stopped with exit status $?: $(grep '^stopped' parts.log)"
llmgen run --out parts -- --steps "$steps" --checkpoint-every 50 --checkpoint-keep 2 --resume

cmp whole/model.bin parts/model.bin && echo "the same model, bit for bit"
