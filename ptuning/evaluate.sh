#!/usr/bin/env bash
# Answers of a P-tuning checkpoint of train.sh: ROUGE and BLEU, and generated_predictions.txt.
# CHECKPOINT=adgen-chatglm2-6b-pt-128-2e-2 STEP=3000 bash evaluate.sh
set -euo pipefail
cd "$(dirname "$0")"
source ./launch.sh
CHECKPOINT=${CHECKPOINT:-adgen-chatglm2-6b-pt-128-2e-2}
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
    --model_name_or_path "${MODEL:-THUDM/chatglm2-6b}" \
    --ptuning_checkpoint "./output/$CHECKPOINT/checkpoint-$STEP" \
    --output_dir "./output/$CHECKPOINT" \
    --overwrite_output_dir \
    --max_source_length 64 \
    --max_target_length 64 \
    --per_device_eval_batch_size 1 \
    --predict_with_generate \
    --pre_seq_len "${PRE_SEQ_LEN:-128}" \
    --quantization_bit 4 \
    "$@"
