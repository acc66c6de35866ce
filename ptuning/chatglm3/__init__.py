"""ChatGLM3: what differs from ChatGLM2, which is its configuration, tokenizer, prompt and chat methods."""
