"""What the first ChatGLM-6B does in another way than ChatGLM2: configuration, tokenizer, transformer; names of weights."""
