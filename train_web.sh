#!/usr/bin/env bash
# A page to train in the browser; it can be closed, and the runs go on. Change a variable here, or in front of the command:
#   PORT=7871 bash train_web.sh --root /data
[ -z "${BASH_VERSION:-}" ] && echo "error: use bash: bash $0" >&2 && exit 2 # has to be one line, as the next
grep -q $'\r' "$0" && echo "error: $0 has Windows line ends. Remove them: sed -i 's/\r$//' $0" >&2 && exit 2 # has to be one line
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source ptuning/common.sh

HOST=${HOST:-127.0.0.1} # address to listen on; any other than this machine's own needs --auth
PORT=${PORT:-7870}      # port to listen on

name_variables_of_flags
exec python ptuning/train_web.py \
  --server_name "$HOST" \
  --server_port "$PORT" \
  "$@"
