"""Bad flags, command lines and files of flags: each is refused in one message."""

import json

from conftest import TINY
from support.damage import deep
from support.refusals import TRAIN, here, refuse, table, train_flags  # noqa: F401, fixtures

# What is wrong with the words behind a good command line for training, and what the message says.
FLAGS = [
    ("unknown", "--zzzz 1", "Unknown flag --zzzz"),
    ("misspelt", "--lerning_rate 1", "Did you mean --learning_rate?"),
    ("a Chinese dash", "——seed 1", "——seed"),
    ("one dash", "-seed 1", "-seed"),
    ("no value", "--max_steps", ("--max_steps", "expected one argument")),
    ("two values", "--max_steps 1 2", ("2",)),
    ("text for a number", "--max_steps many", ("--max_steps", "'many'")),
    ("a fraction of a step", "--max_steps 1.5", ("--max_steps", "'1.5'")),
    ("a decimal comma", "--learning_rate 0,02", ("--learning_rate", "'0,02'")),
    ("neither true nor false", "--do_sample perhaps", ("--do_sample", "perhaps")),
    ("no such strategy", "--eval_strategy never", ("--eval_strategy", "never")),
    ("no such save strategy", "--save_strategy sometimes", ("--save_strategy", "sometimes")),
    ("no such optimizer", "--optim adam_x", ("--optim", "adam_x")),
    ("no such schedule", "--lr_scheduler_type wavy", ("--lr_scheduler_type", "wavy")),
    ("no such logger", "--report_to paper", ("--report_to", "paper")),
    ("no such backend", "--quantization_backend cuda", ("--quantization_backend", "cuda")),
    ("no such debug option", "--debug loudly", ("loudly",)),
    ("bits of no kind", "--quantization_bit 5", "--quantization_bit 5"),
    ("bits of a float", "--quantization_bit 16", "--quantization_bit 16"),
    ("negative bits", "--quantization_bit -4", "--quantization_bit -4"),
    ("an empty prefix", "--pre_seq_len 0", "--pre_seq_len 0"),
    ("a negative prefix", "--pre_seq_len -128", "--pre_seq_len -128"),
    ("a huge prefix", "--pre_seq_len 1000000000", "--pre_seq_len 1000000000"),
    ("dropout 1", "--prefix_dropout 1", "--prefix_dropout 1.0"),
    ("dropout nan", "--prefix_dropout nan", "--prefix_dropout nan"),
    ("no source length", "--max_source_length 0", "--max_source_length 0"),
    ("a source length below the template", "--max_source_length 3", ("--max_source_length 3", "fixed part")),
    ("a negative target length", "--max_target_length -1", "--max_target_length -1"),
    ("no target length in evaluation", "--val_max_target_length 0", "--val_max_target_length 0"),
    ("no rows", "--max_train_samples 0", "--max_train_samples 0"),
    ("minus one row", "--max_eval_samples -1", "--max_eval_samples -1"),
    ("minus one worker", "--preprocessing_num_workers -1", "--preprocessing_num_workers -1"),
    ("minus one loader", "--dataloader_num_workers -1", "--dataloader_num_workers -1"),
    ("an empty batch", "--per_device_train_batch_size 0", "--per_device_train_batch_size 0"),
    ("a negative batch", "--per_device_train_batch_size -4", "--per_device_train_batch_size -4"),
    ("an empty batch in evaluation", "--per_device_eval_batch_size 0", "--per_device_eval_batch_size 0"),
    ("no accumulation", "--gradient_accumulation_steps 0", "--gradient_accumulation_steps 0"),
    ("a negative rate", "--learning_rate -0.02", "--learning_rate -0.02"),
    ("a rate of nan", "--learning_rate nan", "--learning_rate nan"),
    ("an infinite rate", "--learning_rate inf", "--learning_rate inf"),
    ("a rate that moves nothing", "--learning_rate 0", "--learning_rate 0"),
    ("steps below -1", "--max_steps -5", "--max_steps -5"),
    ("no epochs", "--max_steps -1 --num_train_epochs 0", "--num_train_epochs 0"),
    ("negative epochs", "--max_steps -1 --num_train_epochs -3", "--num_train_epochs -3"),
    ("nan epochs", "--max_steps -1 --num_train_epochs nan", "--num_train_epochs nan"),
    ("a save every 0 steps", "--save_steps 0", "--save_steps 0"),
    ("a save every -1 steps", "--save_steps -1", "--save_steps -1"),
    ("a line every 0 steps", "--logging_steps 0", "--logging_steps 0"),
    ("a dev loss every 0 steps", "--eval_strategy steps --validation_file {train} --eval_steps 0", "--eval_steps 0"),
    ("negative warmup", "--warmup_steps -3", "--warmup_steps -3"),
    ("a warmup of nan", "--warmup_steps nan", "--warmup_steps nan"),
    ("a negative decay", "--weight_decay -1", "--weight_decay -1"),
    ("a decay of nan", "--weight_decay nan", "--weight_decay nan"),
    ("clipping at nan", "--max_grad_norm nan", "--max_grad_norm nan"),
    ("clipping below 0", "--max_grad_norm -1", "--max_grad_norm -1"),
    ("a beta of 1.5", "--adam_beta1 1.5", "--adam_beta1 1.5"),
    ("a beta of nan", "--adam_beta2 nan", "--adam_beta2 nan"),
    ("a negative epsilon", "--adam_epsilon -1", "--adam_epsilon -1"),
    ("smoothing above 1", "--label_smoothing_factor 2", "--label_smoothing_factor 2"),
    ("smoothing of the official loss", "--precision official --label_smoothing_factor 0.1", "--label_smoothing_factor"),
    ("kernels of other models", "--use_liger_kernel", "--use_liger_kernel"),
    ("rows shared by processes", "--parallelism_config {{}}", "--parallelism_config"),
    ("a negative seed", "--seed -1", "--seed -1"),
    ("a seed beyond 32 bits", "--seed 5000000000", "--seed 5000000000"),
    ("no top_p", "--top_p 0", "--top_p 0"),
    ("a top_p of nan", "--top_p nan", "--top_p nan"),
    ("temperature 0 while sampling", "--temperature 0", "--do_sample false is greedy"),
    ("a temperature of nan", "--temperature nan", "--temperature nan"),
    ("an infinite temperature", "--temperature inf", "--temperature inf"),
    ("no beams", "--num_beams 0", "--num_beams 0"),
    ("no generated length", "--generation_max_length -3", "--generation_max_length -3"),
    ("two precisions", "--fp16 --bf16", ("fp16", "bf16")),
    ("a missing DeepSpeed file", "--deepspeed nowhere.json", ("deepspeed",)),
    ("a key twice", '--lr_scheduler_kwargs {{"a":1,"a":2}}', ("--lr_scheduler_kwargs", "the key 'a' stands twice")),
    ("schedule arguments that are no JSON", "--lr_scheduler_kwargs {{", ("--lr_scheduler_kwargs",)),
    ("schedule arguments that are a list", "--lr_scheduler_kwargs [1]", "--lr_scheduler_kwargs [1] is no JSON object"),
    ("a logger that is not installed", "--report_to comet_ml", "--report_to comet_ml"),
    ("no steps", "--max_steps 0", "--max_steps 0"),
    (
        "checkpointing arguments that are no JSON",
        "--gradient_checkpointing_kwargs {{",
        "--gradient_checkpointing_kwargs",
    ),
    ("a missing accelerator file", "--accelerator_config nowhere.json", "nowhere.json"),
    ("the best model without a dev loss", "--load_best_model_at_end", "--load_best_model_at_end"),
    ("no such method", "--finetuning_type magic", ("--finetuning_type", "magic")),
    ("a rank without LoRA", "--lora_rank 4", ("--lora_rank 4", "--finetuning_type lora")),
    ("a rank of 0", "--finetuning_type lora --lora_rank 0", "--lora_rank 0"),
    ("a dev loss without a file", "--eval_strategy steps", "--eval_strategy steps needs --validation_file"),
    ("metrics without a file", "--do_eval", "--do_eval needs --validation_file"),
    ("predictions without a file", "--do_predict", "--do_predict needs --test_file"),
    ("training without a prefix", "--pre_seq_len", ("--pre_seq_len", "expected one argument")),
    ("no model", "--model_name_or_path none-such", "--model_name_or_path none-such: there is no such folder"),
    ("an empty model", "--model_name_or_path= ", "--model_name_or_path is missing"),
    ("a file as model", "--model_name_or_path {train}", "train.json is a file; give the folder"),
    ("an empty folder as model", "--model_name_or_path .", "config.json is missing"),
    ("a hub model while offline", "--model_name_or_path THUDM/chatglm2-6b", ("THUDM/chatglm2-6b", "HF_ENDPOINT")),
    ("a hub model of no name", "--model_name_or_path a/b%c", ("--model_name_or_path a/b%c",)),
    ("no checkpoint to start from", "--ptuning_checkpoint nowhere", "--ptuning_checkpoint nowhere"),
    ("no checkpoint to resume from", "--resume_from_checkpoint nowhere", "--resume_from_checkpoint nowhere"),
    ("nothing to resume", "--resume_from_checkpoint True", ("--resume_from_checkpoint True", "output")),
    ("the output is a file", "--output_dir {train}", "train.json"),
    ("the output is below a file", "--output_dir {train}/run", "train.json/run"),
    ("the output's name is too long", "--output_dir {long}", "File name too long"),
    ("no output", "--output_dir= ", "--output_dir is missing"),
    ("the logs go to a file", "--report_to tensorboard --logging_dir {train}", "train.json"),
]


@table(FLAGS)
def test_flags_are_refused(case, forks, here):
    words, says = case
    more = [word.format(train=here / "train.json", long="x" * 300) for word in words.split(" ")]
    more = [word for word in more if word] if "= " not in words else more[:1]
    refuse(forks, here, [*train_flags(here), *more], says)


# What is wrong with a whole command line, and what the message says.
COMMANDS = [
    ("nothing at all", "", "--output_dir is missing"),
    ("nothing to do", "--output_dir output", "Nothing to do"),
    ("no file to train on", "--do_train --output_dir output", "--do_train needs --train_file"),
    ("a word without a flag", "train --output_dir output", "Stray word 'train'"),
    ("no columns", "--do_train --train_file train.json --output_dir o --pre_seq_len 4 --model_name_or_path {tiny}",
     "--prompt_column is missing"),
    ("no response column", "--do_train --train_file train.json --output_dir o --pre_seq_len 4 --prompt_column content "
     "--model_name_or_path {tiny}", "--response_column is missing"),
    ("no prefix length", "--do_train --train_file train.json --output_dir o --model_name_or_path {tiny} "
     "--prompt_column content --response_column summary", "--do_train needs --pre_seq_len"),
    ("a prefix length without a prefix", "--do_predict --test_file train.json --output_dir o --pre_seq_len 4 "
     "--prompt_column content --response_column summary --model_name_or_path {tiny}", "random prefix"),
    ("no model", "--do_predict --test_file train.json --output_dir o --prompt_column content --response_column summary",
     "--model_name_or_path is missing"),
    ("an unknown layer for LoRA", "--do_train --train_file train.json --output_dir o --model_name_or_path {tiny} "
     "--prompt_column content --response_column summary --finetuning_type lora --lora_target q_proj",
     "--lora_target q_proj: expected some of"),
    ("no file of flags", "settings.json", "settings.json: there is no such file"),
]  # fmt: skip


@table(COMMANDS)
def test_a_command_line_is_refused(case, forks, here):
    words, says = case
    refuse(forks, here, words.format(tiny=TINY).split(), says)


GOOD_SETTINGS = {**TRAIN, "model_name_or_path": str(TINY), "train_file": "train.json", "output_dir": "output"}
# What is wrong with a file of flags, its content (a dictionary changes a good one), and what the message says.
SETTINGS = [
    ("empty", "", "settings.json is not valid JSON"),
    ("broken", '{"do_train": true,}', "settings.json is not valid JSON"),
    ("a list", "[]", "settings.json must hold one object"),
    ("not text", b'{"a": "\0"}', "settings.json line 1, byte 7 (0x00) is no text"),
    ("a flag twice", '{"seed": 1,\n"seed": 2}', "settings.json line 1 begins an object that has the key 'seed' twice"),
    ("a nested key twice", '{"lr_scheduler_kwargs":\n{"a": 1, "a": 2}}', ("settings.json line 2", "the key 'a' twice")),
    ("nested 100,000 deep", deep(100_000, '{"a":', "}"), ("settings.json", "nested")),
    ("a number of 5,000 digits", '{"seed": ' + "9" * 5000 + "}", ("settings.json", "digits")),
    ("an unknown flag", {"lerning_rate": 1}, "Did you mean --learning_rate?"),
    ("text for a number", {"max_steps": "many"}, ("--max_steps", "'many'")),
    ("a list for a number", {"max_steps": [1, 2]}, "2"),
    ("an object for a number", {"max_steps": {"a": 1}}, "--max_steps"),
    ("NaN for a rate", {"learning_rate": float("nan")}, "--learning_rate nan"),
    ("true for a number", {"max_steps": True}, ("--max_steps", "'True'")),
    ("a NUL in a name", {"train_file": "a\0b"}, "a\\x00b does not exist"),
    ("half a character in a name", {"train_file": "a\ud83d"}, "a\\ud83d does not exist"),
]


@table(SETTINGS)
def test_a_file_of_flags_is_refused(case, forks, here):
    content, says = case
    if isinstance(content, dict):
        content = json.dumps({**GOOD_SETTINGS, **content})
    (here / "settings.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    refuse(forks, here, ["settings.json"], says)


def test_a_file_of_flags_that_may_not_be_read_is_refused(forks, here):
    (here / "settings.json").write_text(json.dumps(GOOD_SETTINGS))
    (here / "settings.json").chmod(0)
    refuse(forks, here, ["settings.json"], "settings.json: Permission denied", as_root=False)


def test_flags_behind_a_file_of_flags_are_refused(forks, here):
    (here / "settings.json").write_text(json.dumps(GOOD_SETTINGS))
    refuse(forks, here, ["settings.json", "--seed", "1"], ("settings.json", "stands alone"))


def test_a_good_file_of_flags_is_taken(forks, here):
    (here / "settings.json").write_text(json.dumps(GOOD_SETTINGS))
    assert forks.run("main.py", ["settings.json"], cwd=here).returncode == 0
