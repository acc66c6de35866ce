"""The former place of what scripts of people's own import from here; checkpoint.py has it now."""

from checkpoint import ChatGLMForConditionalGeneration, load_pretrained, register_auto_classes

__all__ = ["ChatGLMForConditionalGeneration", "load_pretrained", "register_auto_classes"]
