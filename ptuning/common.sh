# What train.sh, train_chat.sh, evaluate.sh and web_demo.sh share; sourced by them, in the project's folder.

# GPUs to use: those that CUDA_VISIBLE_DEVICES names, else all there are; 1 process without a GPU.
count_gpus() {
  local gpus
  if [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then
    echo "$CUDA_VISIBLE_DEVICES" | tr ',' '\n' | grep -c .
  elif gpus=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU'); then
    echo "$gpus"
  else
    echo 1
  fi
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

# Before torchrun: is it there, where does the program leave its exit status, how many threads has a process.
# A program that refuses its input leaves status 2 in a file: torchrun would bury its message under a traceback
# of its own.
prepare_launch() {
  if ! command -v torchrun >/dev/null; then
    echo "error: torchrun is not installed here. Run: pip install -r requirements.txt" >&2
    exit 2
  fi
  PTUNING_STATUS_FILE=$(mktemp)
  export PTUNING_STATUS_FILE
  trap 'rm -f "$PTUNING_STATUS_FILE"' EXIT
  if [ "$NUM_GPUS" -gt 1 ] && [ -z "${OMP_NUM_THREADS:-}" ]; then
    OMP_NUM_THREADS=$((($(nproc) + NUM_GPUS - 1) / NUM_GPUS)) # processor threads of each process
    export OMP_NUM_THREADS
  fi
}

# After torchrun: end with the status that the program left.
finish_launch() {
  local status
  status=$(cat "$PTUNING_STATUS_FILE")
  exit "${status:-0}"
}
