"""Names of number formats, as lines for the user and files have them."""


def dtype_name(dtype) -> str:
    """float32 for torch.float32, and so on."""
    return str(dtype).removeprefix("torch.")
