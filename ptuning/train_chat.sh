#!/usr/bin/env bash
# P-tuning v2 on conversations (one JSON object per line: prompt, response, history; or conversations for ChatGLM3).
# Other names: --prompt_column question --response_column answer --history_column before.
# CHAT_TRAIN_DATA=train.json CHAT_VAL_DATA=dev.json CHECKPOINT_NAME=output/chat bash train_chat.sh
set -euo pipefail
cd "$(dirname "$0")"
source ./launch.sh
PRE_SEQ_LEN=${PRE_SEQ_LEN:-128}
LR=${LR:-1e-2}
NUM_GPUS=${NUM_GPUS:-1}

launch "$NUM_GPUS" "$@"

"${LAUNCH[@]}" main.py \
    --do_train \
    --train_file "${CHAT_TRAIN_DATA:?name the training file}" \
    --validation_file "${CHAT_VAL_DATA:?name the validation file}" \
    --preprocessing_num_workers 10 \
    --overwrite_cache \
    --model_name_or_path "${MODEL:-THUDM/chatglm2-6b}" \
    --output_dir "${CHECKPOINT_NAME:?name the output folder}" \
    --overwrite_output_dir \
    --max_source_length 256 \
    --max_target_length 256 \
    --per_device_train_batch_size 1 \
    --per_device_eval_batch_size 1 \
    --gradient_accumulation_steps 16 \
    --predict_with_generate \
    --max_steps 3000 \
    --logging_steps 10 \
    --save_steps 1000 \
    --learning_rate "$LR" \
    --pre_seq_len "$PRE_SEQ_LEN" \
    --quantization_bit 4 \
    "$@"
