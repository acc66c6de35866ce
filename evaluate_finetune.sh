#!/usr/bin/env bash
# Answer dev.json with what finetune.sh trained and score the answers. Change a variable here, or in front of the command:
#   MODEL=THUDM/chatglm2-6b STEP=5000 bash evaluate_finetune.sh --do_sample false
[ -z "${BASH_VERSION:-}" ] && echo "error: use bash: bash $0" >&2 && exit 2 # has to be one line, as the next
grep -q $'\r' "$0" && echo "error: $0 has Windows line ends. Remove them: sed -i 's/\r$//' $0" >&2 && exit 2 # has to be one line
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source ptuning/common.sh
set -a # what is set below, evaluate.sh reads from the environment

# evaluate.sh does the work. Its other variables are explained there, and may be set here too.
FINETUNING_TYPE=${FINETUNING_TYPE:-full}   # as in finetune.sh: part of the run's default name
case $FINETUNING_TYPE in
  lora) LR=${LR:-1e-3} ;;                  # as in finetune.sh: part of the run's default name
  *) LR=${LR:-1e-4} ;;
esac
MODEL=${MODEL:-}                           # hub id or folder of the base model, or tiny
MAX_SOURCE_LENGTH=${MAX_SOURCE_LENGTH-}    # longest prompt, tokens; empty: as in training
MAX_TARGET_LENGTH=${MAX_TARGET_LENGTH-}    # longest reference, tokens; prompt and answer get both together and 1
defaults_of_tiny                           # with tiny: smaller defaults for the variables below
QUANTIZATION_BIT=                          # as in training
CHECKPOINT=${CHECKPOINT:-adgen-$(basename "$MODEL")-$FINETUNING_TYPE-$LR} # name of the run: output/$CHECKPOINT
official_length=256                        # prompt and reference, tokens, in the official script
checkpoint_flag=checkpoint_dir             # the flag for what is no prefix

exec bash "$PWD/evaluate.sh" "$@"
