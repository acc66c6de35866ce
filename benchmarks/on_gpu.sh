#!/usr/bin/env bash
# Everything here that needs a GPU, in four parts of at most 9 minutes, each complete in itself, from the repository's
# root:
#
#     bash benchmarks/on_gpu.sh a|b|c|d FOLDER [STEP …]      (PYTHON=… chooses the interpreter, SIZE=tiny is a dry run)
#
#   a   versions, tests, rates of products and attention, quantized layers
#   b   profiles of training and decoding steps, speed beside the official recipe
#   c   speed in int4, the full-size folder, NCCL, a small run from end to end
#   d   what measuring and keeping what is forgotten costs; time and memory of a step on preferences; who answers under
#       auto, on the small model; with MODEL=THUDM/chatglm2-6b, what keeping and auto bring, on ADGEN
#
# What each step prints goes to FOLDER/PART as well, beside its JSON. Without names all steps run, each at most as many
# seconds as it says below. A step that fails or runs out of its time does not stop the others; endings.json and the last
# lines say how each ended.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
usage="usage: bash benchmarks/on_gpu.sh a|b|c|d FOLDER [STEP …]"
part=${1:?"$usage"}
out=${2:?"$usage"}/$part
[[ $part = [abcd] ]] || { echo "error: $usage" >&2 && exit 2; }
chosen=" ${*:3} "
python=${PYTHON:-python3}
size=${SIZE:-6b}
export PYTHONPATH=ptuning
mkdir -p "$out"
names=() endings=() limits=0

step() { # name, seconds, command …
  local name=$1 limit=$2 started=$SECONDS status
  shift 2
  names+=("$name")
  limits=$((limits + limit))
  [[ $chosen = "  " || $chosen = *" $name "* ]] || return 0
  echo "== $name: $*"
  timeout --kill-after=10 "$limit" "$@" &>"$out/$name.log"
  status=$?
  endings+=("{\"step\": \"$name\", \"status\": $status, \"seconds\": $((SECONDS - started)), \"limit\": $limit}")
  tail -n 40 "$out/$name.log"
}

"$python" - <<'PYTHON' | tee "$out/versions.txt"
import importlib.metadata as metadata

packages = ("torch", "triton", "transformers", "accelerate", "datasets", "sentencepiece", "safetensors")
others = {"pytest": "the tests", "peft": "a contender of speed", "matplotlib": "plots"}
for name in (*packages, *others):
    try:
        print(name, metadata.version(name))
    except metadata.PackageNotFoundError:
        print(f"MISSING: {name}, for {others.get(name, 'the program itself')}: pip install {name}")
try:
    import torch
    from benchmarks.contenders.base import find_data

    print("GPU:", torch.cuda.get_device_name() if torch.cuda.is_available() else "none, this is a dry run")
    print("tokenizer and rows:", *find_data())
except ImportError as error:
    print(f"MISSING: {error}")
PYTHON
command -v nvidia-smi >/dev/null && nvidia-smi | tee "$out/nvidia-smi.txt"
sample=AdvertiseGen/sample/train.json
speed=(--size "$size" --no_growth --repeats 1) steps=(--size "$size") layers=(--repeats 3) processes=gpu pairs=8
if [ "$size" != 6b ]; then
  speed+=(--rows 8 --prompts 4 --new_tokens 4) steps+=(--train_rows 1 --decode_rows 1 8) processes=1 pairs=2
  layers=(--repeats 1 --layers dense)
fi
case $part in
  a)
    step tests 240 "$python" -m pytest -q -p no:cacheprovider tests/chatglm2/test_on_gpu.py \
      tests/chatglm2/test_kernels.py \
      tests/chatglm2/test_quantization_triton.py \
      tests/chatglm2/test_quantization_backends.py \
      tests/chatglm2/test_generation.py \
      tests/chatglm2/test_modeling.py \
      tests/chatglm2/test_training_forward.py -m "not slow"
    step rates 120 "$python" -m benchmarks.gpu_steps rates --size "$size" --out "$out"
    step quantization 150 "$python" -m benchmarks.quantization --rows 1 8 16 32 64 1024 "${layers[@]}"
    ;;
  b)
    step steps 280 "$python" -m benchmarks.gpu_steps steps --out "$out" "${steps[@]}"
    step speed 240 "$python" -m benchmarks.speed "${speed[@]}"
    ;;
  c)
    step speed-int4 130 "$python" -m benchmarks.speed --quantization_bit 4 "${speed[@]}"
    [ "$size" = 6b ] && step full-size 200 "$python" -m benchmarks.full_size --bits 4 8 0 --rows 8 --new_tokens 64
    step nccl 60 "$python" ptuning/launch.py --nproc-per-node="$processes" ptuning/main.py --do_train \
      --train_file "$sample" --prompt_column content --response_column summary --model_name_or_path ptuning/tiny \
      --output_dir "$out/nccl" --overwrite_output_dir --pre_seq_len 32 --max_steps 20 --learning_rate 2e-2
    step train 90 env MODEL=tiny CHECKPOINT=on-gpu bash train.sh
    step evaluate 60 env MODEL=tiny CHECKPOINT=on-gpu bash evaluate.sh
    ;;
  d)
    step drift 110 "$python" -m benchmarks.gpu_steps drift --size "$size" --out "$out"
    step preference 110 "$python" -m benchmarks.gpu_steps preference --size "$size" --pairs "$pairs" --out "$out"
    step auto 80 "$python" -m benchmarks.forgetting --lines official,auto --steps 40 --dev_rows 60 --output_dir "$out/auto"
    [ -z "${MODEL:-}" ] || step forgetting 240 "$python" -m benchmarks.forgetting --model "$MODEL" --data AdvertiseGen \
      --general ptuning/forgetting/general.jsonl --general_dev none --dev_rows 64 --lines official,keep,auto \
      --steps 100 --keep 0.8:1 --output_dir "$out/forgetting" --more pre_seq_len=128
    ;;
esac
if [ ${#endings[@]} = 0 ]; then
  echo "error: no step of part $part is called '${*:3}'; choose from: ${names[*]}" >&2
  exit 2
fi
(IFS=, && echo "{\"part\": \"$part\", \"limit\": $limits, \"steps\": [${endings[*]}]}") >"$out/endings.json"
printf '%s\n' "== endings of at most $limits s" "${endings[@]}"
