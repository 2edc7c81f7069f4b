#!/usr/bin/env bash
# Answers of a fully tuned checkpoint of ds_train_finetune.sh: ROUGE and BLEU, and generated_predictions.txt.
# CHECKPOINT=adgen-chatglm2-6b-ft-1e-4 STEP=3000 bash evaluate_finetune.sh
set -euo pipefail
cd "$(dirname "$0")"
source ./launch.sh
CHECKPOINT=${CHECKPOINT:-adgen-chatglm2-6b-ft-1e-4}
STEP=${STEP:-3000}
NUM_GPUS=${NUM_GPUS:-1}
data "${DATA:-AdvertiseGen}"

launch "$NUM_GPUS" "$@"

"${LAUNCH[@]}" main.py \
    --do_predict \
    --validation_file "$DEV_DATA" \
    --test_file "$DEV_DATA" \
    --overwrite_cache \
    --prompt_column content \
    --response_column summary \
    --model_name_or_path "./output/$CHECKPOINT/checkpoint-$STEP" \
    --output_dir "./output/$CHECKPOINT" \
    --overwrite_output_dir \
    --max_source_length 256 \
    --max_target_length 256 \
    --per_device_eval_batch_size 1 \
    --predict_with_generate \
    --fp16_full_eval \
    "$@"
