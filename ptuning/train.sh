#!/usr/bin/env bash
# P-tuning v2 on AdvertiseGen (one JSON object per line: content, summary), as in ChatGLM-6B and ChatGLM2-6B.
# MODEL=... DATA=... NUM_GPUS=4 bash train.sh --any_other_argument ...
set -euo pipefail
cd "$(dirname "$0")"
source ./launch.sh
PRE_SEQ_LEN=${PRE_SEQ_LEN:-128}
LR=${LR:-2e-2}
NUM_GPUS=${NUM_GPUS:-1}
MODEL=${MODEL:-THUDM/chatglm2-6b}
data "${DATA:-AdvertiseGen}"

launch "$NUM_GPUS" "$@"

"${LAUNCH[@]}" main.py \
    --do_train \
    --train_file "$TRAIN_DATA" \
    --validation_file "$DEV_DATA" \
    --preprocessing_num_workers 10 \
    --prompt_column content \
    --response_column summary \
    --overwrite_cache \
    --model_name_or_path "$MODEL" \
    --output_dir "${OUTPUT:-output/adgen-$(basename "$MODEL")-pt-$PRE_SEQ_LEN-$LR}" \
    --overwrite_output_dir \
    --max_source_length 64 \
    --max_target_length 128 \
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
