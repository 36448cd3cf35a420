#!/usr/bin/env bash
# Trains a small model on text of your own: examples/train-on-your-text.sh FILE_OR_FOLDER... [-- PROGRAM FLAGS]
# All that it makes is in ./own-text: the tokens, the source, the program, the model.
set -euo pipefail
config="$(dirname "$0")/small.toml"
sources=()
while [ $# -gt 0 ] && [ "$1" != "--" ]; do
    sources+=("$1")
    shift
done
[ ${#sources[@]} -gt 0 ] || { echo "usage: $0 FILE_OR_FOLDER... [-- PROGRAM FLAGS]" >&2 && exit 2; }

llmgen export-tokens "${sources[@]}" --tokenizer bytes --out own-text/data
llmgen run --config "$config" --out own-text -- --train-data 'own-text/data/train_*.bin' \
    --val-data 'own-text/data/val_*.bin' --tokenizer own-text/data/tokenizer.bin "${@:2}"
