"""The official names of ChatGLM-6B's weights, and those that they have in chatglm2/'s modules."""

# Official beginning and end of a name, own beginning and end. What stands between is the same.
PREFIXES = (
    ("transformer.word_embeddings.", "transformer.embedding.word_embeddings."),
    ("transformer.layers.", "transformer.encoder.layers."),
    ("transformer.final_layernorm.", "transformer.encoder.final_layernorm."),
    ("lm_head.", "transformer.output_layer."),
)
INNER = (".attention.", ".self_attention.")
FREQUENCIES = ".rotary_emb.inv_freq"  # stored for every layer, computed here


def own_name(official: str) -> str | None:
    """The name here of a stored tensor; None for one that is computed."""
    if official.endswith(FREQUENCIES):
        return None
    for before, after in PREFIXES:
        if official.startswith(before):
            return after + official.removeprefix(before).replace(*INNER)
    return official


def official_name(own: str) -> str:
    """The name under which a weight of chatglm2/'s modules is stored."""
    for before, after in PREFIXES:
        if own.startswith(after):
            return before + own.removeprefix(after).replace(*reversed(INNER))
    return own


def computed_names(num_layers: int) -> list[str]:
    """Those of the rotary frequencies in a file of a model."""
    return [f"transformer.layers.{number}.attention{FREQUENCIES}" for number in range(num_layers)]
