#!/usr/bin/env bash
# Answer dev.json with what finetune.sh trained and score the answers. Change a variable here, or in front of the command:
#   MODEL=THUDM/chatglm2-6b STEP=5000 bash evaluate_finetune.sh --do_sample false
grep -q $'\r' "$0" && echo "error: $0 has Windows line ends. Remove them: sed -i 's/\r$//' $0" >&2 && exit 2 # has to be one line
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source ptuning/common.sh

FINETUNING_TYPE=${FINETUNING_TYPE:-full}   # as in finetune.sh: part of the run's default name
case $FINETUNING_TYPE in
  lora) LR=${LR:-1e-3} ;;                  # likewise
  *) LR=${LR:-1e-4} ;;
esac
MODEL=${MODEL:-} # hub id or folder of the base model, or tiny
if [ "$MODEL" = tiny ]; then
  source ptuning/tiny/settings.sh # smaller defaults for the variables below
fi
DATA=${DATA:-AdvertiseGen}                 # folder with train.json and dev.json
STEP=${STEP:-}                             # which checkpoint: 5000, best (lowest dev loss) or last
                                           # empty: best, or last where no dev loss was measured
EVAL_BATCH_SIZE=${EVAL_BATCH_SIZE:-}       # rows a GPU answers at once, at most; empty: as many as fit
MAX_SOURCE_LENGTH=${MAX_SOURCE_LENGTH:-256} # longest prompt, tokens
MAX_TARGET_LENGTH=${MAX_TARGET_LENGTH:-256} # longest reference, tokens; prompt and answer get both together and 1
NUM_GPUS=${NUM_GPUS:-$(count_gpus)}        # processes, one for each GPU
NNODES=1                                   # one machine answers: that which has the checkpoint
CHECKPOINT=${CHECKPOINT:-adgen-$(basename "$MODEL")-$FINETUNING_TYPE-$LR} # name of the run: output/$CHECKPOINT

check_model_and_data "$DATA/dev.json"
launch ptuning/main.py \
  --do_predict \
  --validation_file "$DATA/dev.json" \
  --test_file "$DATA/dev.json" \
  --prompt_column content \
  --response_column summary \
  --model_name_or_path "$MODEL" \
  --checkpoint_dir "$(checkpoint_of_step)" \
  --output_dir "output/$CHECKPOINT" \
  --overwrite_output_dir \
  --max_source_length "$MAX_SOURCE_LENGTH" \
  --max_target_length "$MAX_TARGET_LENGTH" \
  ${EVAL_BATCH_SIZE:+--per_device_eval_batch_size "$EVAL_BATCH_SIZE"} \
  --predict_with_generate \
  "$@"
