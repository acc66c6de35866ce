#!/usr/bin/env bash
# Train on pairs of answers, rows of prompt, chosen and rejected: a reward model, or a model that prefers what was chosen.
#   MODEL=THUDM/chatglm2-6b DATA=my-pairs STAGE=dpo START=output/my-run bash train_preference.sh
[ -z "${BASH_VERSION:-}" ] && echo "error: use bash: bash $0" >&2 && exit 2 # has to be one line, as the next
grep -q $'\r' "$0" && echo "error: $0 has Windows line ends. Remove them: sed -i 's/\r$//' $0" >&2 && exit 2 # has to be one line
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source ptuning/common.sh
set -a # what is set below, train.sh reads from the environment

# train.sh does the work. Its other variables are explained there, and may be set here too.
STAGE=${STAGE:-dpo}                        # rm: a reward model; dpo: prefer the chosen answers; ppo: with --reward_model
START=${START:-}                           # run or checkpoint to start from, tuned on answers; empty: the base model
FINETUNING_TYPE=${FINETUNING_TYPE:-p_tuning} # p_tuning: a prefix; lora: an adapter; as START was trained
case $FINETUNING_TYPE in
  lora) LR=${LR:-1e-4} ;;                  # learning rate at the start; falls to 0 in a straight line
  *) LR=${LR:-5e-3} ;;
esac
MODEL=${MODEL:-}                           # hub id or folder of the base model, or tiny
defaults_of_tiny                           # with tiny: smaller defaults for the variables below
DATA=${DATA:-data}                         # folder with train.json and dev.json
PRE_SEQ_LEN=${PRE_SEQ_LEN:-128}            # virtual tokens of a prefix, without START
PROMPT_COLUMN=${PROMPT_COLUMN:-prompt}     # what the prompt is called in its rows; the answers are chosen and rejected
RESPONSE_COLUMN=${RESPONSE_COLUMN:-response} # what may hold both answers in a list, the better one first
HISTORY_COLUMN=${HISTORY_COLUMN:-history}  # what earlier questions and answers are called, where there are any
MAX_STEPS=${MAX_STEPS:-1000}               # optimizer steps
SAVE_STEPS=${SAVE_STEPS:-500}              # steps between checkpoints
MAX_SOURCE_LENGTH=${MAX_SOURCE_LENGTH:-256} # longest prompt with its history, tokens
MAX_TARGET_LENGTH=${MAX_TARGET_LENGTH:-256} # longest answer, tokens
CHECKPOINT=${CHECKPOINT:-$STAGE-$(basename "$MODEL")-$FINETUNING_TYPE-$LR} # name of the run: output/$CHECKPOINT
GENERAL_FILE=                              # what is forgotten is measured in tuning on answers only
with_prefix=                               # empty: no prefix, or the one of START
[ -n "$START" ] || [ "$FINETUNING_TYPE" = lora ] || with_prefix=yes

exec bash "$PWD/train.sh" --stage "$STAGE" --finetuning_type "$FINETUNING_TYPE" ${START:+--ptuning_checkpoint "$START"} "$@"
