#!/usr/bin/env bash
# Everything here that needs a GPU, in one command, from the repository's root:
#
#     bash benchmarks/on_gpu.sh FOLDER [STEP …]        (PYTHON=… chooses the interpreter)
#
# What each step prints goes to FOLDER as well. Without names all steps run, each at most as many seconds as it says
# below. A step that fails or runs out of its time does not stop the others; the last lines say how each ended.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${1:?"usage: bash benchmarks/on_gpu.sh FOLDER [STEP …]"}
chosen=" ${*:2} "
python=${PYTHON:-python3}
export PYTHONPATH=ptuning
mkdir -p "$out"
names=() endings=()

step() { # name, seconds, command …
  local name=$1 limit=$2 started=$SECONDS
  shift 2
  names+=("$name")
  [[ $chosen = "  " || $chosen = *" $name "* ]] || return 0
  echo "== $name: $*"
  timeout --kill-after=10 "$limit" "$@" &>"$out/$name.log"
  endings+=("$name: status $?, $((SECONDS - started)) s")
  tail -n 40 "$out/$name.log"
}

nvidia-smi
"$python" -c 'import torch, transformers as t; print(torch.__version__, t.__version__, torch.cuda.get_device_name())'
sample=AdvertiseGen/sample/train.json
step tests 150 "$python" -m pytest -q tests/chatglm2/test_quantization_triton.py tests/chatglm2/test_quantization.py \
  tests/chatglm2/test_quantization_backends.py \
  tests/chatglm2/test_generation.py \
  tests/chatglm2/test_modeling.py \
  tests/chatglm2/test_training_forward.py \
  tests/chatglm2/test_configuration.py
step quantization 150 "$python" -m benchmarks.quantization --repeats 3
step speed 300 "$python" -m benchmarks.speed --size 6b --repeats 1
step speed-int4 150 "$python" -m benchmarks.speed --size 6b --no_growth --repeats 1 --quantization_bit 4
step full-size 240 "$python" -m benchmarks.full_size --bits 4 8 0 --rows 8 --new_tokens 64
step speed-int8 150 "$python" -m benchmarks.speed --size 6b --no_growth --repeats 1 --quantization_bit 8
step nccl 90 "$python" -m torch.distributed.run --standalone --nproc_per_node gpu ptuning/main.py --do_train \
  --train_file "$sample" --prompt_column content --response_column summary --model_name_or_path ptuning/tiny \
  --output_dir "$out/nccl" --overwrite_output_dir --pre_seq_len 32 --max_steps 20 --learning_rate 2e-2
step train 120 env MODEL=tiny CHECKPOINT=on-gpu bash train.sh
step evaluate 90 env MODEL=tiny CHECKPOINT=on-gpu bash evaluate.sh
if [ ${#endings[@]} = 0 ]; then
  echo "error: no step is called '${*:2}'; choose from: ${names[*]}" >&2
  exit 2
fi
printf '%s\n' "== endings" "${endings[@]}" | tee "$out/endings.log"
