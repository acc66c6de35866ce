#!/usr/bin/env bash
# A page to talk to the tuned model. Change a variable here, or in front of the command:
#   MODEL=THUDM/chatglm2-6b STEP=2000 bash web_demo.sh --auth user:password
[ -z "${BASH_VERSION:-}" ] && echo "error: use bash: bash $0" >&2 && exit 2 # has to be one line, as the next
grep -q $'\r' "$0" && echo "error: $0 has Windows line ends. Remove them: sed -i 's/\r$//' $0" >&2 && exit 2 # has to be one line
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source ptuning/common.sh

MODEL=${MODEL:-}                # hub id or folder of the base model, or tiny
defaults_of_tiny                # with tiny: smaller defaults for the variables below
PRE_SEQ_LEN=${PRE_SEQ_LEN:-128} # as in train.sh: part of the run's default name
LR=${LR:-2e-2}                  # as in train.sh: part of the run's default name
STEP=${STEP:-}                  # which checkpoint to start with: 3000, best or last; empty: best, or last
HOST=${HOST:-0.0.0.0}           # address to listen on: 0.0.0.0 for everyone, 127.0.0.1 for this machine only
PORT=${PORT:-7860}              # port to listen on
QUANTIZATION_BIT=${QUANTIZATION_BIT-4} # 4 or 8: integer weights; empty: as in training
CHECKPOINT=${CHECKPOINT:-adgen-$(basename "$MODEL")-pt-$PRE_SEQ_LEN-$LR} # name of the run: output/$CHECKPOINT

check_model_and_data
check_run
name_variables_of_flags
exec python ptuning/web_demo.py \
  --model_name_or_path "$MODEL" \
  --ptuning_checkpoint "$(checkpoint_of_step)" \
  --server_name "$HOST" \
  --server_port "$PORT" \
  ${QUANTIZATION_BIT:+--quantization_bit "$QUANTIZATION_BIT"} \
  "$@"
