#!/usr/bin/env bash
# Tune the weights of ChatGLM2-6B itself on ADGEN, or a LoRA adapter. Change a variable here, or in front of the command:
#   MODEL=THUDM/chatglm2-6b NUM_GPUS=4 ENGINE=deepspeed bash finetune.sh --seed 1
grep -q $'\r' "$0" && echo "error: $0 has Windows line ends. Remove them: sed -i 's/\r$//' $0" >&2 && exit 2 # has to be one line
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source ptuning/common.sh

FINETUNING_TYPE=${FINETUNING_TYPE:-full}   # full: all weights; freeze: some layers; lora: an adapter
case $FINETUNING_TYPE in
  lora) LR=${LR:-1e-3} ;;                  # learning rate at the start; falls to 0 in a straight line
  *) LR=${LR:-1e-4} ;;
esac
MODEL=${MODEL:-} # hub id or folder of the base model, or tiny
if [ "$MODEL" = tiny ]; then
  source ptuning/tiny/settings.sh # smaller defaults for the variables below
fi
DATA=${DATA:-AdvertiseGen}                 # folder with train.json and dev.json
MAX_STEPS=${MAX_STEPS:-5000}               # optimizer steps
SAVE_STEPS=${SAVE_STEPS:-1000}             # steps between checkpoints; a full one has 25 GB, and its optimizer 50
BATCH_SIZE=${BATCH_SIZE:-4}                # rows a GPU handles at once
ACCUMULATION=${ACCUMULATION:-1}            # such batches in one step
MAX_SOURCE_LENGTH=${MAX_SOURCE_LENGTH:-64} # longest prompt, tokens
MAX_TARGET_LENGTH=${MAX_TARGET_LENGTH:-64} # longest response, tokens
DEV_ROWS=${DEV_ROWS:-200}                  # first rows of dev.json, for the dev loss at the start and every save
EVAL_BATCH_SIZE=${EVAL_BATCH_SIZE:-8}      # the same in one batch; changes nothing but speed and memory
QUANTIZATION_BIT=${QUANTIZATION_BIT-}      # lora only. 4 or 8: integer weights; empty: bf16 or fp16
ENGINE=${ENGINE-}                          # full only, divides weights and optimizer over the GPUs: fsdp, deepspeed
                                           # (ZeRO-2) or zero3; empty: every GPU holds all of it
NUM_GPUS=${NUM_GPUS:-$(count_gpus)}        # processes on this machine, one for each GPU
NNODES=${NNODES:-1}                        # machines that train together; each runs this script
NODE_RANK=${NODE_RANK:-}                   # which of them this is: 0, 1, …; 0 writes the run. Needed if NNODES > 1
MASTER_ADDR=${MASTER_ADDR:-}               # address of machine 0, the same on all. Needed if NNODES > 1
MASTER_PORT=${MASTER_PORT:-29500}          # a free port of machine 0, the same on all
CHECKPOINT=${CHECKPOINT:-adgen-$(basename "$MODEL")-$FINETUNING_TYPE-$LR} # name of the run: output/$CHECKPOINT

check_model_and_data "$DATA/train.json" "$DATA/dev.json"
case $ENGINE in
  fsdp) engine=(--fsdp "full_shard auto_wrap") ;;
  deepspeed) engine=(--deepspeed ptuning/deepspeed.json) ;;
  zero3) engine=(--deepspeed ptuning/deepspeed_zero3.json) ;;
  "") engine=() ;;
  *) echo "error: ENGINE=$ENGINE: expected fsdp, deepspeed, zero3, or nothing." >&2 && exit 2 ;;
esac
launch ptuning/main.py \
  --do_train \
  --finetuning_type "$FINETUNING_TYPE" \
  --train_file "$DATA/train.json" \
  --validation_file "$DATA/dev.json" \
  --eval_strategy steps \
  --eval_steps "$SAVE_STEPS" \
  --eval_on_start \
  --max_eval_samples "$DEV_ROWS" \
  --preprocessing_num_workers 10 \
  --prompt_column content \
  --response_column summary \
  --model_name_or_path "$MODEL" \
  --output_dir "output/$CHECKPOINT" \
  --overwrite_output_dir \
  --max_source_length "$MAX_SOURCE_LENGTH" \
  --max_target_length "$MAX_TARGET_LENGTH" \
  --per_device_train_batch_size "$BATCH_SIZE" \
  --per_device_eval_batch_size "$EVAL_BATCH_SIZE" \
  --gradient_accumulation_steps "$ACCUMULATION" \
  --predict_with_generate \
  --max_steps "$MAX_STEPS" \
  --logging_steps 10 \
  --save_steps "$SAVE_STEPS" \
  --learning_rate "$LR" \
  ${engine[@]+"${engine[@]}"} \
  ${QUANTIZATION_BIT:+--quantization_bit "$QUANTIZATION_BIT"} \
  "$@"
