#!/usr/bin/env bash
# Tune a prefix on dialogues: rows of prompt, response, and history (a list of [question, answer] pairs).
#   MODEL=THUDM/chatglm2-6b DATA=my-dialogues bash train_chat.sh
[ -z "${BASH_VERSION:-}" ] && echo "error: use bash: bash $0" >&2 && exit 2 # has to be one line, as the next
grep -q $'\r' "$0" && echo "error: $0 has Windows line ends. Remove them: sed -i 's/\r$//' $0" >&2 && exit 2 # has to be one line
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source ptuning/common.sh
set -a # what is set below, train.sh reads from the environment

# train.sh does the work. Its other variables are explained there, and may be set here too.
MODEL=${MODEL:-}                           # hub id or folder of the base model, or tiny
defaults_of_tiny                           # with tiny: smaller defaults for the variables below
DATA=${DATA:-data}                         # folder with train.json and dev.json
PROMPT_COLUMN=${PROMPT_COLUMN:-prompt}     # what the prompt is called in its rows
RESPONSE_COLUMN=${RESPONSE_COLUMN:-response} # what the response is called
HISTORY_COLUMN=${HISTORY_COLUMN:-history}  # what earlier questions and answers are called
PRE_SEQ_LEN=${PRE_SEQ_LEN:-128}            # virtual tokens of the prefix
LR=${LR:-1e-2}                             # learning rate at the start; falls to 0 in a straight line
MAX_SOURCE_LENGTH=${MAX_SOURCE_LENGTH:-256} # longest prompt with its history, tokens
MAX_TARGET_LENGTH=${MAX_TARGET_LENGTH:-256} # longest response, tokens
CHECKPOINT=${CHECKPOINT:-chat-$(basename "$MODEL")-pt-$PRE_SEQ_LEN-$LR} # name of the run: output/$CHECKPOINT

exec bash "$PWD/train.sh" "$@"
