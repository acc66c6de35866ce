# What MODEL=tiny stands for; sourced by the scripts at the top of the project, which explain each variable.
MODEL=ptuning/tiny
DATA=${DATA:-AdvertiseGen/sample}
PRE_SEQ_LEN=${PRE_SEQ_LEN:-32}
LR=${LR:-2e-2}
MAX_STEPS=${MAX_STEPS:-200}
SAVE_STEPS=${SAVE_STEPS:-100}
BATCH_SIZE=${BATCH_SIZE:-16}
[ "$BATCH_SIZE" != auto ] || ACCUMULATION=${ACCUMULATION:-16}
ACCUMULATION=${ACCUMULATION:-1}
DEV_ROWS=${DEV_ROWS:-240}
EVAL_BATCH_SIZE=${EVAL_BATCH_SIZE:-60}
MAX_SOURCE_LENGTH=${MAX_SOURCE_LENGTH-64}
MAX_TARGET_LENGTH=${MAX_TARGET_LENGTH-64}
GENERAL_FILE=${GENERAL_FILE-AdvertiseGen/sample/general.json}
QUANTIZATION_BIT=${QUANTIZATION_BIT-}
# Matrices this small gain nothing from a second thread, and on a busy machine threads wait for each other.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
