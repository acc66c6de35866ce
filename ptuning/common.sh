# What the scripts at the top of the project share; sourced by them, in the project's folder.
# train_chat.sh and finetune.sh set other defaults and end as train.sh, evaluate_finetune.sh as evaluate.sh.

# With MODEL=tiny: the small model that ships with the project, and what suits it for variables that are not set yet.
defaults_of_tiny() {
  if [ "$MODEL" = tiny ]; then
    source ptuning/tiny/settings.sh
  fi
}

export PTUNING_CALLED_FROM=${OLDPWD:-} # where a relative path in "$@" is looked for, too; see ptuning/paths.py

# GPUs to use: those that CUDA_VISIBLE_DEVICES names, else all there are; 1 process without a GPU.
count_gpus() {
  local gpus
  if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
    gpus=$(echo "$CUDA_VISIBLE_DEVICES" | tr ',' '\n' | grep -c '^[^-]') || gpus=1 # empty, or -1: none
    echo "$gpus"
  elif gpus=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU'); then
    echo "$gpus"
  else
    echo 1
  fi
}

# What STEP means in the run output/$CHECKPOINT; ptuning/checkpoint.py knows best, last and all, and a run's folder.
checkpoint_of_step() {
  case "$STEP" in
    '') echo "output/$CHECKPOINT" ;;
    best | last | all) echo "output/$CHECKPOINT/$STEP" ;;
    *) echo "output/$CHECKPOINT/checkpoint-$STEP" ;;
  esac
}

# Stop with what to do next when the model or a data file is not there.
check_model_and_data() {
  if [ -z "$MODEL" ]; then
    cat >&2 <<'TEXT'
error: MODEL is not set. Which model?
  ChatGLM2-6B (12.5 GB), downloaded from the hub:  MODEL=THUDM/chatglm2-6b bash train.sh
    through a mirror:                              HF_ENDPOINT=https://hf-mirror.com MODEL=THUDM/chatglm2-6b bash train.sh
    from ModelScope:  pip install modelscope && modelscope download ZhipuAI/chatglm2-6b --local_dir chatglm2-6b
    a folder on disk:                              MODEL=./chatglm2-6b bash train.sh
  The small model that ships with this project, on a CPU in a minute:  MODEL=tiny bash train.sh
TEXT
    exit 2
  fi
  local file
  for file in "$@"; do
    if [ ! -f "$file" ]; then
      cat >&2 <<TEXT
error: $file does not exist (DATA=$DATA).
  ADGEN, the data of the official example:  bash AdvertiseGen/download.sh
  Your own rows:  DATA=folder-with-train.json-and-dev.json bash train.sh
  The sample that ships with this project, with the small model:  MODEL=tiny bash train.sh
TEXT
      exit 2
    fi
  done
}

# Start a program on every GPU of this machine, and of NNODES machines: `launch program flags…`, the script's last
# command.
launch() {
  check_end_of_command
  if ! command -v torchrun >/dev/null; then
    echo "error: torchrun is not installed here. Run: pip install -r requirements.txt" >&2
    exit 2
  fi
  check_number NUM_GPUS "$NUM_GPUS" 1
  check_number NNODES "$NNODES" 1
  if [ "$NNODES" -eq 1 ] && [ "$NUM_GPUS" -eq 1 ]; then
    exec python ptuning/launch.py "$@"
  fi
  local machines=(--standalone --nnodes=1)
  if [ "$NNODES" -gt 1 ]; then
    check_machines
    machines=(--nnodes="$NNODES" --node-rank="$NODE_RANK" --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT")
    echo "Machine $NODE_RANK of $NNODES: waiting up to 15 minutes for the others at $MASTER_ADDR:$MASTER_PORT."
  fi
  if [ "$NUM_GPUS" -gt 1 ] && [ -z "${OMP_NUM_THREADS:-}" ]; then
    OMP_NUM_THREADS=$((($(nproc) + NUM_GPUS - 1) / NUM_GPUS)) # processor threads of each process
    export OMP_NUM_THREADS
  fi
  exec python ptuning/launch.py "${machines[@]}" --nproc-per-node="$NUM_GPUS" "$@"
}

# check_number NAME value minimum: stop unless the value is a whole number, at least the minimum.
check_number() {
  if ! [[ $2 =~ ^[0-9]+$ ]] || [ "$2" -lt "$3" ]; then
    echo "error: $1=$2: expected a whole number, at least $3." >&2
    exit 2
  fi
}

# Stop with what is missing when several machines shall train together.
check_machines() {
  local example="NNODES=$NNODES NODE_RANK=1 MASTER_ADDR=10.0.0.1 bash train.sh"
  if [ -z "$NODE_RANK" ]; then
    echo "error: NNODES=$NNODES needs NODE_RANK, 0 on the first machine, 1 on the second, …: $example" >&2
    exit 2
  fi
  check_number NODE_RANK "$NODE_RANK" 0
  check_number MASTER_PORT "$MASTER_PORT" 1
  if [ "$NODE_RANK" -ge "$NNODES" ]; then
    echo "error: NODE_RANK=$NODE_RANK: with NNODES=$NNODES it counts from 0 to $((NNODES - 1))." >&2
    exit 2
  fi
  if [ -z "$MASTER_ADDR" ]; then
    echo "error: NNODES=$NNODES needs MASTER_ADDR, the address of machine 0, the same on every machine: $example" >&2
    exit 2
  fi
}

# Stop where editing has left something that bash cannot read, before anything runs: it would stop in the middle. Bash
# names the line where it gave up, which for a quotation mark is the end of the script.
check_script() {
  local message
  message=$(LC_ALL=C bash -n "$1" 2>&1) && return
  if [[ $message == *'matching `"'* ]]; then
    awk -v script="$1" '
      /^[ \t]*#/ { next }
      {
        code = $0 # without what is in quotation marks, and without its comment
        gsub(/"[^"]*"/, "", code)
        sub(/[ \t]#.*/, "", code)
        if (code ~ /"/) {
          printf "error: %s, line %d: a quotation mark without its partner.\n  %s\n", script, NR, $0
          found = 1
          exit
        }
      }
      END { exit !found }
    ' "$1" >&2 && exit 2
  fi
  echo "error: bash cannot read ${message%%$'\n'*}" >&2
  exit 2
}

# Stop where the command of `launch` has ended too early: the next line that bash would run is one of flags. Bash has
# read the script as far as here, and the system knows how far that is; elsewhere than on Linux nothing is checked.
check_end_of_command() {
  local script position next
  script=$(readlink "/proc/$$/fd/255" 2>/dev/null) && [ -f "$script" ] || return 0
  position=$(awk '$1 == "pos:" { print $2 }' "/proc/$$/fdinfo/255")
  next=$(tail -c "+$((position + 1))" "$script" | grep -m 1 -n -v '^[[:space:]]*\(#.*\)\?$') || return 0
  if [[ ${next#*:} =~ ^[[:space:]]*(--[a-z\"]|\"\$@\"|\$\{[A-Za-z_]+:\+--) ]]; then
    local line=$(($(head -c "$position" "$script" | wc -l) + ${next%%:*}))
    echo "error: ${0##*/}, line $line: this line is not part of the command, which has ended above it: a line of the" \
      "command ends in a \\, with nothing behind it, and no comment or empty line stands between two of them." >&2
    echo "  ${next#*:}" >&2
    exit 2
  fi
}

if [ -f "${0##*/}" ]; then
  check_script "${0##*/}"
fi
