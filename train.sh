#!/usr/bin/env bash
# Tune a prefix for ChatGLM2-6B on ADGEN. Change a variable here, or in front of the command:
#   MODEL=THUDM/chatglm2-6b NUM_GPUS=8 bash train.sh --seed 1
[ -z "${BASH_VERSION:-}" ] && echo "error: use bash: bash $0" >&2 && exit 2 # has to be one line, as the next
grep -q $'\r' "$0" && echo "error: $0 has Windows line ends. Remove them: sed -i 's/\r$//' $0" >&2 && exit 2 # has to be one line
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source ptuning/common.sh

MODEL=${MODEL:-}                           # hub id or folder of the base model, or tiny
defaults_of_tiny                           # with tiny: smaller defaults for the variables below
DATA=${DATA:-AdvertiseGen}                 # folder with train.json and dev.json, or .jsonl, .csv, or these with .gz
PRE_SEQ_LEN=${PRE_SEQ_LEN:-128}            # virtual tokens of the prefix
LR=${LR:-2e-2}                             # learning rate at the start; falls to 0 in a straight line
MAX_STEPS=${MAX_STEPS:-3000}               # optimizer steps
SAVE_STEPS=${SAVE_STEPS:-1000}             # steps between checkpoints
BATCH_SIZE=${BATCH_SIZE:-1}                # rows a GPU handles at once; auto: as many of ACCUMULATION rows as fit
ACCUMULATION=${ACCUMULATION:-16}           # such batches in one step
PROMPT_COLUMN=${PROMPT_COLUMN:-content}    # what the prompt is called in the rows
RESPONSE_COLUMN=${RESPONSE_COLUMN:-summary} # what the response is called
HISTORY_COLUMN=${HISTORY_COLUMN:-}         # what earlier questions and answers are called; empty: there are none
MAX_SOURCE_LENGTH=${MAX_SOURCE_LENGTH:-64} # longest prompt, tokens
MAX_TARGET_LENGTH=${MAX_TARGET_LENGTH:-128} # longest response, tokens
DEV_RATIO=${DEV_RATIO:-}                   # share of the training rows held out as dev rows, such as 0.05; empty: the dev
                                           # file of DATA
DEV_ROWS=${DEV_ROWS:-200}                  # first rows of the dev file, for the dev loss at the start and every save
EVAL_BATCH_SIZE=${EVAL_BATCH_SIZE:-8}      # the same in one batch; changes nothing but speed and memory
GENERAL_FILE=${GENERAL_FILE-ptuning/forgetting/general.jsonl} # general prompts: how much of them the run forgets; empty: not
                                           # measured
QUANTIZATION_BIT=${QUANTIZATION_BIT-4}     # 4 or 8: integer weights; empty: bf16 or fp16
NUM_GPUS=${NUM_GPUS:-$(count_gpus)}        # processes on this machine, one for each GPU
NNODES=${NNODES:-1}                        # machines that train together; each runs this script
NODE_RANK=${NODE_RANK:-}                   # which of them this is: 0, 1, …; 0 writes the run. Needed if NNODES > 1
MASTER_ADDR=${MASTER_ADDR:-}               # address of machine 0, the same on all. Needed if NNODES > 1
MASTER_PORT=${MASTER_PORT:-29500}          # a free port of machine 0, the same on all
CHECKPOINT=${CHECKPOINT:-adgen-$(basename "$MODEL")-pt-$PRE_SEQ_LEN-$LR} # name of the run: output/$CHECKPOINT
with_prefix=${with_prefix-yes}             # empty: no prefix, for finetune.sh
evaluate_with=${evaluate_with:-evaluate.sh} # what the end of a run names, finetune.sh has its own

train_file=$(data_file train)
dev_file=$(data_file dev)
check_model_and_data "$train_file" "$dev_file"
[ -z "$DEV_RATIO" ] || dev_file=
say_what_to_do_next "$evaluate_with"
if [ "$BATCH_SIZE" = auto ]; then
  BATCH_SIZE=$ACCUMULATION ACCUMULATION=1
  set -- --auto_find_batch_size "$@"
fi
launch ptuning/main.py \
  --do_train \
  --train_file "$train_file" \
  ${dev_file:+--validation_file "$dev_file"} \
  ${DEV_RATIO:+--dev_ratio "$DEV_RATIO"} \
  --eval_strategy steps \
  --eval_steps "$SAVE_STEPS" \
  --eval_on_start \
  --max_eval_samples "$DEV_ROWS" \
  --preprocessing_num_workers 10 \
  --prompt_column "$PROMPT_COLUMN" \
  --response_column "$RESPONSE_COLUMN" \
  ${HISTORY_COLUMN:+--history_column "$HISTORY_COLUMN"} \
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
  ${GENERAL_FILE:+--general_file "$GENERAL_FILE"} \
  ${with_prefix:+--pre_seq_len "$PRE_SEQ_LEN"} \
  ${QUANTIZATION_BIT:+--quantization_bit "$QUANTIZATION_BIT"} \
  "$@"
