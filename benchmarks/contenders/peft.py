"""transformers' GlmForCausalLM with PEFT's PrefixTuningConfig, as one would write it today."""

import torch
from benchmarks.contenders.base import COMMON, Contender
from peft import PrefixTuningConfig, get_peft_model
from torch.nn.utils.rnn import pad_sequence
from transformers import GlmConfig, GlmForCausalLM


class Peft(Contender):
    def build(self):
        config = GlmConfig(
            vocab_size=COMMON["padded_vocab_size"],
            hidden_size=self.sizes["hidden_size"],
            intermediate_size=self.sizes["ffn_hidden_size"],
            num_hidden_layers=self.sizes["num_layers"],
            num_attention_heads=self.sizes["num_attention_heads"],
            num_key_value_heads=COMMON["multi_query_group_num"],
            head_dim=self.sizes["kv_channels"],
            rms_norm_eps=COMMON["layernorm_epsilon"],
            pad_token_id=0,
            eos_token_id=None,
        )
        model = GlmForCausalLM(config).to(self.device, self.dtype)
        model.generation_config.eos_token_id = None
        prefix = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=self.settings.pre_seq_len)
        self.model = get_peft_model(model, prefix)

    def loss(self, batch):
        def padded(name, value):
            return pad_sequence([torch.tensor(row[name]) for row in batch], True, value).to(self.device)

        input_ids, labels = padded("input_ids", 0), padded("labels", -100)
        mask = pad_sequence([torch.ones(len(row["input_ids"]), dtype=torch.int64) for row in batch], True, 0)
        return self.model(input_ids=input_ids, attention_mask=mask.to(self.device), labels=labels).loss

    def generate(self, prompts):
        input_ids = torch.tensor(prompts, device=self.device)
        answers = self.model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=self.settings.new_tokens,
            do_sample=False,
        )
        return answers[:, input_ids.shape[1] :]
