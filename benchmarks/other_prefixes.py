"""main.py with prefixes that it has no flag for, to find out whether one of them would earn it.

    PYTHONPATH=ptuning python -m benchmarks.other_prefixes --first_layer 2 --do_train … (flags of main.py)

--first_layer N    the prefix is in the layers from the N-th on only, counted from 0
--norm_penalty W   W / 2 times the sum of the squares of the prefix's weights is added to the loss of every step
"""

import argparse
import sys

import chatglm2.modeling_chatglm as modeling
import main
import trainer


def keep_out_of_layers(first):
    """Let the layers before `first` attend as if there were no prefix: its keys are there, and they leave them out."""
    attend, block, model = modeling.attend, modeling.SelfAttention.forward, modeling.ChatGLMModel.forward
    now = {"layer": 0, "prefix": 0}

    def attend_without(query, key, value, mask, dropout=0.0):
        start = now["prefix"] if now["layer"] < first else 0
        if start and mask is not None:
            mask = [numbers[..., start:] for numbers in mask]
        return attend(query, key[:, :, start:], value[:, :, start:], mask, dropout)

    def forward_block(self, *args, **kwargs):
        now["layer"] = self.layer_index
        return block(self, *args, **kwargs)

    def forward_model(self, *args, **kwargs):
        now["prefix"] = self.prefix_encoder.pre_seq_len if self.prefix_encoder is not None else 0
        return model(self, *args, **kwargs)

    modeling.attend, modeling.SelfAttention.forward = attend_without, forward_block
    modeling.ChatGLMModel.forward = forward_model


def penalize_norm(weight):
    """Add the gradient of the penalty, behind that of a step's only batch."""
    step = trainer.PrefixTrainer.training_step

    def training_step(self, model, *args, **kwargs):
        assert self.args.gradient_accumulation_steps == 1
        loss = step(self, model, *args, **kwargs)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad.add_(parameter.detach(), alpha=weight)
        return loss

    trainer.PrefixTrainer.training_step = training_step


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--first_layer", type=int)
    parser.add_argument("--norm_penalty", type=float)
    own, sys.argv[1:] = parser.parse_known_args()
    if own.first_layer:
        keep_out_of_layers(own.first_layer)
    if own.norm_penalty:
        penalize_norm(own.norm_penalty)
    main.main()
