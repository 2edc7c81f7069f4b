#!/usr/bin/env bash
# Answers of a P-tuning checkpoint of train.sh: ROUGE and BLEU, and generated_predictions.txt.
# CHECKPOINT=adgen-chatglm2-6b-pt-128-2e-2 STEP=3000 bash evaluate.sh
set -euo pipefail
cd "$(dirname "$0")"
CHECKPOINT=${CHECKPOINT:-adgen-chatglm2-6b-pt-128-2e-2}
STEP=${STEP:-3000}
NUM_GPUS=${NUM_GPUS:-1}
DATA=${DATA:-AdvertiseGen}

LAUNCH=(python3)
if [ "$NUM_GPUS" -gt 1 ]; then LAUNCH=(torchrun --standalone --nnodes=1 --nproc-per-node="$NUM_GPUS"); fi

"${LAUNCH[@]}" main.py \
    --do_predict \
    --validation_file "$DATA/dev.json" \
    --test_file "$DATA/dev.json" \
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
