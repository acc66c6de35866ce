"""The names of ChatGLM2's weights: its modules here have the official ones."""

ROTARY_TENSOR = "transformer.rotary_pos_emb.inv_freq"  # stored by the official checkpoints, computed here


def own_name(official: str) -> str | None:
    """The name here of a stored tensor; None for one that is computed."""
    return None if official == ROTARY_TENSOR else official


def official_name(own: str) -> str:
    return own


def computed_names(num_layers: int) -> list[str]:
    """Those of the rotary frequencies in a file of a model."""
    return [ROTARY_TENSOR]
