"""p_tuning: a prefix of trained keys and values in front of every layer. The prefix itself is chatglm2/prefix_encoder.py."""

from checkpoints.prefix import load_prefix, read_prefix_settings, save_prefix
from tuning.method import Method, named


class PTuning(Method):
    """The prefix encoder trains, in float32. A checkpoint holds it in the official layout (checkpoint.py)."""

    name = "p_tuning"
    defaults = {"pre_seq_len": None, "prefix_projection": None}
    beside_model = True

    def read_settings(self, checkpoints):
        return {**read_prefix_settings(checkpoints[-1]), "checkpoints": checkpoints}

    def prepare(self, model, checkpoints, settings, *, do_train=False, resume=True):
        if not checkpoints:
            return None
        load_prefix(model, checkpoints[-1])
        kind = "with" if model.config.prefix_projection else "without"
        return f"Prefix of {model.config.pre_seq_len} tokens, {kind} projection,{named(checkpoints)}."

    def save(self, model, folder, sidecar, tensors=None):
        save_prefix(model, folder, sidecar)

    def load(self, model, folder):
        load_prefix(model, folder)
