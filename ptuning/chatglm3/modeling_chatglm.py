"""The ChatGLM3 model: ChatGLM2's transformer, and the official chat methods with a history of messages.

Answers to `chat`, `stream_chat` and `process_response` of the official `modeling_chatglm.py` of ChatGLM3-6B. It differs
in that a history of (question, answer) pairs is taken, too, the caller's history is not changed, and a call of a tool is
read and never evaluated.
"""

import torch

from chatglm2 import modeling_chatglm
from chatglm2.chat import TRAINING_DATE
from chatglm3.configuration_chatglm import ChatGLMConfig
from chatglm3.conversation import read_call, read_messages, split_answer
from chatglm3.tokenization_chatglm import as_tensors

END_OF_MESSAGE = "<|assistant|>"


class ChatGLMForConditionalGeneration(modeling_chatglm.ChatGLMForConditionalGeneration):
    """As of ChatGLM2; with another prompt template than chatglm3 its chat methods are ChatGLM2's."""

    config_class = ChatGLMConfig
    family = "chatglm3"

    def build_inputs(self, tokenizer, query, history=None, role="user"):
        """input_ids, attention_mask, position_ids (1, S) of the whole conversation and the open question."""
        if not tokenizer.keeps_roles:
            return super().build_inputs(tokenizer, query, history)
        return as_tensors(tokenizer.encode_prompt(query, history, role=role)).to(self.device)

    def build_stream_inputs(self, tokenizer, query, history=None, role="user"):
        """input_ids, attention_mask, position_ids (1, S) to feed after a cache that holds `history`: the question alone."""
        if not tokenizer.keeps_roles:
            return super().build_stream_inputs(tokenizer, query, history)
        if not history:
            return self.build_inputs(tokenizer, query, history, role)
        end = tokenizer.get_command(END_OF_MESSAGE)
        return as_tensors([*tokenizer.build_single_message(role, "", query), end]).to(self.device)

    def read_response(self, output, history):
        """(what the model says, `history` with its messages): text, or of a tool its name and parameters or content."""
        history, content = list(history), ""
        for response in output.split(END_OF_MESSAGE):
            metadata, content = split_answer(response)
            content = content if metadata.strip() else content.strip()
            history.append({"role": "assistant", "metadata": metadata, "content": content})
            if not metadata.strip():
                content = content.replace(TRAINING_DATE, "2023年")
            elif history[0].get("role") == "system" and "tools" in history[0]:
                parameters = read_call(content)
                found = {"content": content} if parameters is None else {"parameters": parameters}
                content = {"name": metadata.strip(), **found}
            else:
                content = {"name": metadata.strip(), "content": content}
        return content, history

    def process_response(self, response, history=None):
        """The text of an answer; with a `history` what read_response() gives, as officially."""
        return super().process_response(response) if history is None else self.read_response(response, history)

    def role_in(self, arguments):
        return (arguments.pop("role", "user"),)

    def conclude(self, tokenizer, history, query, response, role="user"):
        if not tokenizer.keeps_roles or (history and not isinstance(history[0], dict)):
            return super().conclude(tokenizer, history, query, response)
        read_messages(history)
        return self.read_response(response, [*(history or []), {"role": role, "content": query}])

    @torch.inference_mode()
    def chat(
        self,
        tokenizer,
        query,
        history=None,
        role="user",
        max_length=8192,
        num_beams=1,
        do_sample=True,
        top_p=0.8,
        temperature=0.8,
        logits_processor=None,
        **kwargs,
    ):
        """As in ChatGLM2; `history` and the one returned are messages of role, metadata and content (or pairs)."""
        how = (max_length, num_beams, do_sample, top_p, temperature, logits_processor)
        return super().chat(tokenizer, query, history, *how, role=role, **kwargs)

    @torch.inference_mode()
    def stream_chat(
        self,
        tokenizer,
        query,
        history=None,
        role="user",
        past_key_values=None,
        max_length=8192,
        do_sample=True,
        top_p=0.8,
        temperature=0.8,
        logits_processor=None,
        return_past_key_values=False,
        **kwargs,
    ):
        """As in ChatGLM2, with the history of chat()."""
        how = (past_key_values, max_length, do_sample, top_p, temperature, logits_processor, return_past_key_values)
        yield from super().stream_chat(tokenizer, query, history, *how, role=role, **kwargs)
