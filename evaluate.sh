#!/usr/bin/env bash
# Answer dev.json with a tuned prefix and score the answers. Change a variable here, or in front of the command:
#   MODEL=THUDM/chatglm2-6b STEP=2000 bash evaluate.sh --do_sample false
[ -z "${BASH_VERSION:-}" ] && echo "error: use bash: bash $0" >&2 && exit 2 # has to be one line, as the next
grep -q $'\r' "$0" && echo "error: $0 has Windows line ends. Remove them: sed -i 's/\r$//' $0" >&2 && exit 2 # has to be one line
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source ptuning/common.sh

MODEL=${MODEL:-}                           # hub id or folder of the base model, or tiny
MAX_SOURCE_LENGTH=${MAX_SOURCE_LENGTH-}    # longest prompt, tokens; empty: as in training
MAX_TARGET_LENGTH=${MAX_TARGET_LENGTH-}    # longest reference, tokens; prompt and answer get both together and 1
defaults_of_tiny                           # with tiny: smaller defaults for the variables below
DATA=${DATA:-AdvertiseGen}                 # folder with dev.json, or .jsonl, .csv, or these with .gz
DEV_RATIO=${DEV_RATIO:-}                   # as in train.sh: the rows that the run has held out; empty: those of DATA, or
                                           # where it has no dev file those held out
PRE_SEQ_LEN=${PRE_SEQ_LEN:-128}            # as in train.sh: part of the run's default name
LR=${LR:-2e-2}                             # as in train.sh: part of the run's default name
STEP=${STEP:-}                             # which checkpoint: 3000, best (lowest dev loss), last, or all in one table
                                           # empty: best, or last where no dev loss was measured
EVAL_BATCH_SIZE=${EVAL_BATCH_SIZE:-}       # rows a GPU answers at once, at most; empty: as many as fit
PROMPT_COLUMN=${PROMPT_COLUMN:-}           # what the prompt is called in the rows; empty: as in training
RESPONSE_COLUMN=${RESPONSE_COLUMN:-}       # what the response is called; empty: as in training
HISTORY_COLUMN=${HISTORY_COLUMN:-}         # what earlier questions and answers are called; empty: as in training
QUANTIZATION_BIT=${QUANTIZATION_BIT-4}     # 4 or 8: integer weights; empty: as in training
NUM_GPUS=${NUM_GPUS:-$(count_gpus)}        # processes, one for each GPU
NNODES=1                                   # one machine answers: that which has the checkpoint
CHECKPOINT=${CHECKPOINT:-adgen-$(basename "$MODEL")-pt-$PRE_SEQ_LEN-$LR} # name of the run: output/$CHECKPOINT
checkpoint_flag=${checkpoint_flag:-ptuning_checkpoint} # the flag for a prefix; evaluate_finetune.sh sets its own
official_length=${official_length:-64}     # prompt and reference, tokens, in the official script

choose_rows
check_model_and_data ${dev_file:+"$dev_file"}
check_run
[[ $typed_flags != *" --device_map"[\ =]* ]] || NUM_GPUS=1 # one process spreads the model over all of them
defaults_of_official_checkpoint
launch ptuning/main.py \
  --do_predict \
  ${dev_file:+--validation_file "$dev_file" --test_file "$dev_file"} \
  ${data_sets:+--dataset "$data_sets" --dataset_dir "$DATA"} \
  ${PROMPT_COLUMN:+--prompt_column "$PROMPT_COLUMN"} \
  ${RESPONSE_COLUMN:+--response_column "$RESPONSE_COLUMN"} \
  ${HISTORY_COLUMN:+--history_column "$HISTORY_COLUMN"} \
  --model_name_or_path "$MODEL" \
  --"$checkpoint_flag" "$(checkpoint_of_step)" \
  --output_dir "output/$CHECKPOINT" \
  --overwrite_output_dir \
  ${MAX_SOURCE_LENGTH:+--max_source_length "$MAX_SOURCE_LENGTH"} \
  ${MAX_TARGET_LENGTH:+--max_target_length "$MAX_TARGET_LENGTH"} \
  ${EVAL_BATCH_SIZE:+--per_device_eval_batch_size "$EVAL_BATCH_SIZE"} \
  --predict_with_generate \
  ${QUANTIZATION_BIT:+--quantization_bit "$QUANTIZATION_BIT"} \
  "$@"
