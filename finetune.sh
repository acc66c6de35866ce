#!/usr/bin/env bash
# Tune the weights of ChatGLM2-6B itself on ADGEN, or a LoRA adapter. Change a variable here, or in front of the command:
#   MODEL=THUDM/chatglm2-6b NUM_GPUS=4 ENGINE=deepspeed bash finetune.sh --seed 1
[ -z "${BASH_VERSION:-}" ] && echo "error: use bash: bash $0" >&2 && exit 2 # has to be one line, as the next
grep -q $'\r' "$0" && echo "error: $0 has Windows line ends. Remove them: sed -i 's/\r$//' $0" >&2 && exit 2 # has to be one line
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source ptuning/common.sh
set -a # what is set below, train.sh reads from the environment

# train.sh does the work. Its other variables are explained there, and may be set here too.
FINETUNING_TYPE=${FINETUNING_TYPE:-full}   # full: all weights; freeze: some layers; lora: an adapter
case $FINETUNING_TYPE in
  lora) LR=${LR:-1e-3} ;;                  # learning rate at the start; falls to 0 in a straight line
  *) LR=${LR:-1e-4} ;;
esac
MODEL=${MODEL:-}                           # hub id or folder of the base model, or tiny
defaults_of_tiny                           # with tiny: smaller defaults for the variables below
DATA=${DATA:-AdvertiseGen}                 # folder with train.json and dev.json
MAX_STEPS=${MAX_STEPS:-5000}               # optimizer steps
SAVE_STEPS=${SAVE_STEPS:-1000}             # steps between checkpoints; a full one has 25 GB, and its optimizer 50
BATCH_SIZE=${BATCH_SIZE:-4}                # rows a GPU handles at once
[ "$BATCH_SIZE" != auto ] || ACCUMULATION=${ACCUMULATION:-4}
ACCUMULATION=${ACCUMULATION:-1}            # such batches in one step
MAX_TARGET_LENGTH=${MAX_TARGET_LENGTH:-64} # longest response, tokens
QUANTIZATION_BIT=${QUANTIZATION_BIT-}      # lora only. 4 or 8: integer weights; empty: bf16 or fp16
ENGINE=${ENGINE-}                          # full only, divides weights and optimizer over the GPUs: fsdp, deepspeed
                                           # (ZeRO-2) or zero3; empty: every GPU holds all of it
CHECKPOINT=${CHECKPOINT:-adgen-$(basename "$MODEL")-$FINETUNING_TYPE-$LR} # name of the run: output/$CHECKPOINT
with_prefix=                               # empty: no prefix

evaluate_with=evaluate_finetune.sh          # what the end of a run names

check_model_and_data "$(data_file train)" "$(data_file dev)"
case $ENGINE in
  fsdp) engine=(--fsdp "full_shard auto_wrap") ;;
  deepspeed) engine=(--deepspeed ptuning/deepspeed.json) ;;
  zero3) engine=(--deepspeed ptuning/deepspeed_zero3.json) ;;
  "") engine=() ;;
  *) echo "error: ENGINE=$ENGINE: expected fsdp, deepspeed, zero3, or nothing." >&2 && exit 2 ;;
esac
exec bash "$PWD/train.sh" --finetuning_type "$FINETUNING_TYPE" ${engine[@]+"${engine[@]}"} "$@"
