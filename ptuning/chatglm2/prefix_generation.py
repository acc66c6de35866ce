"""What transformers' generate() asks of a model, where the prefix takes slots in the cache that it does not know of.

No official file answers to this one: there, generate() was given the prefix as a cache.
"""


class PrefixGeneration:
    """The part of ChatGLMForConditionalGeneration that generate() calls; it stands before GenerationMixin.

    Three things are for generation.py, and other in a model whose tokens see what stands behind them.
    """

    continues_caches = True  # what was computed of a text holds whatever comes behind it

    def prompt_length(self, token_ids):
        """How many of a row's first tokens are its prompt."""
        return len(token_ids)

    @staticmethod
    def place(ordinals, prompt_lengths):
        """Position ids of tokens with these `ordinals` (1 or B, S) in rows with prompts of `prompt_lengths` (B, 1)."""
        return ordinals

    @property
    def prefix_length(self):
        prefix_encoder = self.transformer.prefix_encoder
        return 0 if prefix_encoder is None else prefix_encoder.pre_seq_len

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ):
        return super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length + self.prefix_length
        )

    def prepare_inputs_for_generation(
        self,
        input_ids,
        next_sequence_length=None,
        past_key_values=None,
        inputs_embeds=None,
        is_first_iteration=False,
        **kwargs,
    ):
        # A continued cache counts the prefix among the tokens that need not be fed again.
        continued = past_key_values is not None and int(past_key_values.get_seq_length()) > 0
        if is_first_iteration and next_sequence_length is not None and continued:
            next_sequence_length += self.prefix_length
        return super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )

    @staticmethod
    def create_masks_for_generate(config, inputs_embeds, attention_mask, past_key_values, **kwargs):
        return attention_mask  # the 2D mask: forward adds the prefix and the causal part
