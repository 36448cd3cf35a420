#!/usr/bin/env bash
# Fine-tunes a GPT-2 from HuggingFace and goes back: examples/fine-tune-huggingface.sh MODEL FILE_OR_FOLDER... [-- PROGRAM FLAGS]
# MODEL is a hub id such as openai-community/gpt2, or a folder. The result, for transformers' from_pretrained, is ./fine-tuned/model.
set -euo pipefail
model="${1:-}"
shift || true
sources=()
while [ $# -gt 0 ] && [ "$1" != "--" ]; do
    sources+=("$1")
    shift
done
[ ${#sources[@]} -gt 0 ] || { echo "usage: $0 MODEL FILE_OR_FOLDER... [-- PROGRAM FLAGS]" >&2 && exit 2; }

mkdir -p fine-tuned
llmgen export-weights "$model" --out fine-tuned/base.bin
llmgen export-tokens "${sources[@]}" --tokenizer gpt2 --out fine-tuned/data
llmgen run --config fine-tuned/base.bin --out fine-tuned -- --load fine-tuned/base.bin --save fine-tuned/model.bin \
    --train-data 'fine-tuned/data/train_*.bin' --val-data 'fine-tuned/data/val_*.bin' \
    --tokenizer fine-tuned/data/tokenizer.bin --lr 3e-5 "${@:2}"
llmgen import-weights fine-tuned/model.bin --out fine-tuned/model
