# What the scripts at the top of the project share; sourced by them, in the project's folder.
# train_chat.sh and finetune.sh set other defaults and end as train.sh, evaluate_finetune.sh as evaluate.sh.

# With MODEL=tiny: the small model that ships with the project, and what suits it for variables that are not set yet.
defaults_of_tiny() {
  if [ "$MODEL" = tiny ]; then
    source ptuning/tiny/settings.sh
  fi
}

# What was typed, for messages in these words; set by the first script where one ends as another.
typed_flags="${typed_flags:-} $* "
export typed_flags PTUNING_SCRIPT=${PTUNING_SCRIPT:-$0}
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

# data_file train: the file of that name in $DATA, in the first of the formats that it is there in.
data_file() {
  local ending
  for ending in json jsonl csv json.gz jsonl.gz csv.gz; do
    if [ -f "$DATA/$1.$ending" ]; then
      echo "$DATA/$1.$ending"
      return
    fi
  done
  echo "$DATA/$1.json"
}

# True where a flag names the checkpoint, and not CHECKPOINT and STEP.
names_checkpoint() {
  [[ $typed_flags == *" --ptuning_checkpoint"[\ =]* || $typed_flags == *" --checkpoint_dir"[\ =]* ]]
}

# Set dev_file, or the names data_sets, to the rows to answer: those of DATA; where it has none, or DEV_RATIO is set, those
# that the run has held out of its training rows. ptuning/data/held_out.py has written these.
choose_rows() {
  local held_out=output/$CHECKPOINT/held_out
  dev_file=$(data_file dev) data_sets=
  if [ -n "$DEV_RATIO" ] && names_checkpoint; then
    echo "error: DEV_RATIO=$DEV_RATIO takes rows of the run that CHECKPOINT names, and a flag names another checkpoint." >&2
    echo "  Leave DEV_RATIO out, and name the rows of its run:  DATA=RUN/held_out bash $PTUNING_SCRIPT" >&2
    exit 2
  fi
  if [ -n "$DEV_RATIO" ] || { [ ! -f "$dev_file" ] && ! names_checkpoint; }; then
    if [ -f "$held_out/dev.json" ] || [ -f "$held_out/dataset_info.json" ]; then
      DATA=$held_out dev_file=$held_out/dev.json
    elif [ -n "$DEV_RATIO" ] && [ -d "output/$CHECKPOINT" ]; then
      echo "error: DEV_RATIO=$DEV_RATIO: there is no $held_out, where a run keeps the rows that it holds out." >&2
      echo "  Leave DEV_RATIO out, and name a folder with dev.json:  DATA=FOLDER bash $PTUNING_SCRIPT" >&2
      exit 2
    fi
  fi
  if [[ $DATA == */held_out && ! -f $dev_file && -f $DATA/dataset_info.json ]]; then
    data_sets=$(sed -n 's/^  "\(.*\)": {$/\1/p' "$DATA/dataset_info.json" | paste -sd ,)
    dev_file=
  fi
}

# Stop where output/$CHECKPOINT is no run, or has no checkpoint of that STEP, unless a flag names another one.
check_run() {
  local run=output/$CHECKPOINT found
  if names_checkpoint; then
    return
  fi
  if [ ! -d "$run" ]; then
    found=$(compgen -G "output/*/checkpoint-*" | cut -d/ -f2 | sort -u | paste -sd ' ') || true
    echo "error: there is no run $run; runs there are: ${found:-none yet}." >&2
    if [ -n "$found" ]; then
      echo "  Name one of them:  CHECKPOINT=${found%% *} bash $PTUNING_SCRIPT" >&2
    else
      echo "  Train one first:  bash train.sh" >&2
    fi
    exit 2
  fi
  if [[ $STEP =~ ^[0-9]+$ ]] && [ ! -d "$run/checkpoint-$STEP" ]; then
    found=$(compgen -G "$run/checkpoint-*" | sed 's/.*checkpoint-//' | sort -n | paste -sd ' ') || true
    echo "error: STEP=$STEP: $run has no checkpoint of that step; its steps are: ${found:-none}." >&2
    exit 2
  fi
}

# Columns and lengths of the official scripts, where the run's checkpoints do not remember theirs.
defaults_of_official_checkpoint() {
  if ! compgen -G "output/$CHECKPOINT/checkpoint-*/ptuning.json" >/dev/null; then
    [ "$MODEL" != ptuning/tiny ] || official_length=64
    PROMPT_COLUMN=${PROMPT_COLUMN:-content}
    RESPONSE_COLUMN=${RESPONSE_COLUMN:-summary}
    MAX_SOURCE_LENGTH=${MAX_SOURCE_LENGTH:-$official_length}
    MAX_TARGET_LENGTH=${MAX_TARGET_LENGTH:-$official_length}
  fi
}

# Tell the program which of its flags are variables of this script, so that its messages name these.
name_variables_of_flags() {
  local pair flag name pattern='s/^  (\$\{[A-Za-z_]+:\+)?--([a-z_]+) "\$([A-Z_]+)"\}? \\$/\2=\3/p'
  export PTUNING_FLAGS=
  for pair in $(sed -nE "$pattern" "${0##*/}"); do
    flag=${pair%=*} name=${pair#*=}
    if [[ $typed_flags != *" --$flag"[\ =]* ]]; then
      PTUNING_FLAGS+=$flag=$name=${!name}$'\n'
    fi
  done
}

# say_what_to_do_next evaluate.sh: give the program the commands that its last lines show, with the variables of this
# run where those scripts would take others. The program puts the run's name in.
say_what_to_do_next() {
  local folder variables model=$MODEL data=AdvertiseGen bits=4
  if [ "$MODEL" = ptuning/tiny ]; then
    model=tiny data=AdvertiseGen/sample bits=
  fi
  folder=$(dirname "$PTUNING_SCRIPT")/
  variables="MODEL=$(printf %q "$model") CHECKPOINT=?"
  [ "$QUANTIZATION_BIT" = "$bits" ] || variables+=" QUANTIZATION_BIT=$QUANTIZATION_BIT"
  export PTUNING_TALK="$variables bash ${folder#./}web_demo.sh"
  [ "$DATA" = "$data" ] || variables+=" DATA=$(printf %q "$DATA")"
  export PTUNING_EVALUATE="$variables bash ${folder#./}$1"
  if [ -n "$DEV_RATIO" ]; then # the run keeps its dev rows
    PTUNING_EVALUATE="DEV_RATIO=$DEV_RATIO ${variables%% DATA=*} bash ${folder#./}$1"
  fi
}

# Warn of variables that are nearly called as one that a script reads, such as BATCHSIZE, NUM_GPU or model.
warn_of_near_misses() {
  local name plain
  local -A read=()
  for name in "$@"; do
    plain=${name//_/}
    read[${plain%S}]=$name
  done
  for name in $(compgen -e); do
    plain=${name//_/}
    plain=${plain^^}
    plain=${plain%S}
    if [ -n "$plain" ] && [ -n "${read[$plain]:-}" ] && [[ " $* " != *" $name "* ]]; then
      printf 'warning: %s=%q changes nothing: %s reads %s.\n' "$name" "${!name}" "${0##*/}" "${read[$plain]}" >&2
    fi
  done
}

# Print the flags of the program that the given scripts start, and then the variables of these scripts.
show_help() {
  python "$(grep -hoE '^(launch|exec python) ptuning/[a-z_]+\.py' "$@" | sed 's/.* //')" --help
  echo
  echo "Variables, in front of the command, as in MODEL=tiny bash ${0##*/}; the flags above stand behind it:"
  awk '
    FNR == 1 { file++ }
    match($0, /^ *([a-z]+\) |\*\) )?[A-Z_]+=\$\{/) {
      line = $0
      way = match(line, /^ *([a-z]+|\*)\) /) ? substr(line, 1, RLENGTH - 2) : ""
      gsub(/ /, "", way)
      sub(/^ *([a-z]+|\*)\) /, "", line)
      name = substr(line, 1, index(line, "=") - 1)
      if (name in first && first[name] != file) next
      first[name] = file
      meaning = index(line, " # ") ? substr(line, index(line, " # ") + 3) : ""
      sub(/ *(;; *)?(# .*)?$/, "", line)
      sub(/^[^-]*-/, "", line)
      sub(/}$/, "", line)
      if (line ~ /count_gpus/) line = "all"
      way = way == "" ? "" : way == "*" ? " else" : " with " way
      printf "  %-18s %s%s\n", name, meaning, line way == "" ? "" : " [" line way "]"
    }' "$@"
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
    if [[ ${DEV_RATIO:-} && ${file##*/} = dev.* ]]; then
      continue
    fi
    if [ ! -f "$file" ] && [[ ${file##*/} = dev.* ]] && [ $# -gt 1 ]; then
      echo "error: $file does not exist (DATA=$DATA), nor dev.jsonl, dev.csv, or one of them with .gz." >&2
      echo "  Hold out a part of the training rows instead:  DEV_RATIO=0.05 bash $PTUNING_SCRIPT" >&2
      exit 2
    fi
    if [ ! -f "$file" ]; then
      cat >&2 <<TEXT
error: $file does not exist (DATA=$DATA), nor its like with .jsonl, .csv, or one of them with .gz.
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
  name_variables_of_flags
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
  if [ "$PTUNING_SCRIPT" = "$0" ]; then # the first of two scripts
    scripts=("${0##*/}" $(sed -nE 's/^exec bash "\$PWD\/([a-z_]+\.sh)".*/\1/p' "${0##*/}"))
    if [[ " $* " =~ " --help "|" -h " ]]; then
      show_help "${scripts[@]}"
      exit
    fi
    warn_of_near_misses $(grep -hoE '\b[A-Z_]+=\$\{[A-Z_]+:?-' "${scripts[@]}" | sed 's/=.*//' | sort -u)
  fi
fi
