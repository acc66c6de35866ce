"""Command lines: the official ones, and one that is just enough."""

TRAIN = """--do_train --train_file AdvertiseGen/train.json --validation_file AdvertiseGen/dev.json
--preprocessing_num_workers 10 --prompt_column content --response_column summary --overwrite_cache
--model_name_or_path THUDM/chatglm2-6b --output_dir output/adgen-chatglm2-6b-pt-128-2e-2 --overwrite_output_dir
--max_source_length 64 --max_target_length 128 --per_device_train_batch_size 1 --per_device_eval_batch_size 1
--gradient_accumulation_steps 16 --predict_with_generate --max_steps 3000 --logging_steps 10 --save_steps 1000
--learning_rate 2e-2 --pre_seq_len 128 --quantization_bit 4"""
EVALUATE = """--do_predict --validation_file AdvertiseGen/dev.json --test_file AdvertiseGen/dev.json --overwrite_cache
--prompt_column content --response_column summary --model_name_or_path THUDM/chatglm2-6b
--ptuning_checkpoint ./output/adgen-chatglm2-6b-pt-128-2e-2/checkpoint-3000
--output_dir ./output/adgen-chatglm2-6b-pt-128-2e-2 --overwrite_output_dir --max_source_length 64
--max_target_length 64 --per_device_eval_batch_size 1 --predict_with_generate --pre_seq_len 128 --quantization_bit 4"""
NAMED = "--model_name_or_path THUDM/chatglm2-6b --prompt_column content --response_column summary"
MINIMAL = f"--do_train --train_file t.json --output_dir output/run --pre_seq_len 128 {NAMED}"
