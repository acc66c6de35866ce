"""none: the base model as it is. It answers, and nothing trains."""

from tuning.method import Method


class Untouched(Method):
    """Nothing trains, nothing is loaded, and there is no checkpoint of it."""

    name = "none"

    def to_load(self, checkpoints):
        return []

    def normalized(self, flags):
        return {**flags, "pre_seq_len": None, "prefix_projection": None}

    def bound_flags(self, resume):
        return []

    def prepare(self, model, checkpoints, settings, *, do_train=False, resume=True):
        model.requires_grad_(False)
        return "The untouched base model."
