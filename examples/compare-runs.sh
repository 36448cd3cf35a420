#!/usr/bin/env bash
# Two runs in one plot: examples/compare-runs.sh [STEPS]
# The small GPT-2 and the modern architecture of examples/modern-nano.toml on the same data. Needs pip install 'llmgen[plot]'.
set -euo pipefail
steps="${1:-3000}"
examples="$(cd "$(dirname "$0")" && pwd)"

llmgen run --config gpt2-nano --out gpt2 -- --steps "$steps"
llmgen run --config "$examples/modern-nano.toml" --out modern -- --steps "$steps"
llmgen plot gpt2 modern --out curves.png
