#!/usr/bin/env bash
# GPT-2 124M from scratch on 10 billion tokens of FineWeb: examples/fineweb-gpt2-124m.sh [DIR]
#
# Needs one NVIDIA GPU, 28 GB of disk for the text and 21 GB for its tokens, and pip install 'llmgen[data]'. May be started
# again at any point: what was downloaded or exported stays, and the training goes on from its last checkpoint.
#
# The settings are those of GPT-3's smallest model, as llm.c has them: 524,288 tokens a step, 19,073 steps.
#
# Expected, from published runs of these settings:
#   validation loss 3.28 at the end: llm.c's own trainer ended at 3.2847 (README of modded-nanogpt), where OpenAI's GPT-2
#   124M has 3.29 on the same text. HellaSwag 29.9 % against its 29.4 % (llm.c, discussion 481).
# Cost: 808 million operations a token (llmgen plan --config gpt2-124m --seq-len 1024), so 8.1e18 in all: on one H100 (989e12
# a second) about 6 hours at 40 % of its speed. llm.c's run took 90 minutes and $20 on eight A100.
set -euo pipefail
folder="${1:-fineweb}"

if [ ! -e "$folder/text/complete" ]; then
    hf download HuggingFaceFW/fineweb --repo-type dataset --include 'sample/10BT/*.parquet' --local-dir "$folder/text"
    touch "$folder/text/complete"
fi
if [ ! -e "$folder/tokens/tokenizer.bin" ]; then
    llmgen export-tokens "$folder/text/sample/10BT" --tokenizer gpt2 --val-fraction 0.01 --out "$folder/tokens"
fi
llmgen run --config gpt2-124m --target cuda --out "$folder/run" -- \
    --train-data "$folder/tokens/train_*.bin" --val-data "$folder/tokens/val_*.bin" --tokenizer "$folder/tokens/tokenizer.bin" \
    --total-batch-size 524288 --steps 19073 --shuffle \
    --lr 6e-4 --warmup-steps 700 --final-lr-fraction 0 --weight-decay 0.1 \
    --val-every 250 --val-steps 160 --sample-every 5000 \
    --checkpoint-every 500 --checkpoint-keep 2 --checkpoint-major 5000 --resume
llmgen plot "$folder/run" --out "$folder/curve.png" --x tokens
