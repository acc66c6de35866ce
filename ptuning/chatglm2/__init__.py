"""The model: ChatGLM2's configuration, tokenizer, transformer, prefix and integer weights; no flags, no files."""
