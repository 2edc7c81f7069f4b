#!/usr/bin/env bash
# Full tuning with DeepSpeed ZeRO-2 (deepspeed.json); with less memory: --deepspeed deepspeed_zero3.json.
# NUM_GPUS=4 MODEL=... DATA=... bash ds_train_finetune.sh
set -euo pipefail
cd "$(dirname "$0")"
source ./launch.sh
LR=${LR:-1e-4}
NUM_GPUS=${NUM_GPUS:-4}
MODEL=${MODEL:-THUDM/chatglm2-6b}
data "${DATA:-AdvertiseGen}"
MASTER_PORT=$((10000 + RANDOM % 55536))

command -v deepspeed > /dev/null || stop "DeepSpeed is not installed: pip install deepspeed"
need_gpus "$NUM_GPUS" "$@"
deepspeed --num_gpus="$NUM_GPUS" --master_port "$MASTER_PORT" main.py \
    --deepspeed deepspeed.json \
    --do_train \
    --train_file "$TRAIN_DATA" \
    --test_file "$DEV_DATA" \
    --preprocessing_num_workers 10 \
    --prompt_column content \
    --response_column summary \
    --overwrite_cache \
    --model_name_or_path "$MODEL" \
    --output_dir "${OUTPUT:-./output/adgen-$(basename "$MODEL")-ft-$LR}" \
    --overwrite_output_dir \
    --max_source_length 64 \
    --max_target_length 64 \
    --per_device_train_batch_size 4 \
    --per_device_eval_batch_size 1 \
    --gradient_accumulation_steps 1 \
    --predict_with_generate \
    --max_steps 5000 \
    --logging_steps 10 \
    --save_steps 1000 \
    --learning_rate "$LR" \
    --fp16 \
    "$@"
