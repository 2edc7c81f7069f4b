#!/usr/bin/env bash
# The web page with a P-tuning or LoRA checkpoint: a path relative to this folder, or a full path.
# MODEL=... CHECKPOINT=output/adgen-chatglm2-6b-pt-128-2e-2/checkpoint-3000 bash web_demo.sh --port 7860
set -euo pipefail
cd "$(dirname "$0")"
python3 web_demo.py \
    --model_name_or_path "${MODEL:-THUDM/chatglm2-6b}" \
    --ptuning_checkpoint "${CHECKPOINT:-output/adgen-chatglm2-6b-pt-128-2e-2/checkpoint-3000}" \
    --pre_seq_len "${PRE_SEQ_LEN:-128}" \
    "$@"
