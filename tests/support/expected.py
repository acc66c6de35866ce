"""Other people's tests that fail on this project's classes: file, class and name (* for any), and why."""

EXPECTED = {
    "test_model_peers.py::TestP[!l]*::test_retain_grad_hidden_states_attentions": "only the prefix trains: no gradient reaches the embeddings",
    "test_model_peers.py::TestP[!l]*::test_assisted_decoding*": "the library cuts the attentions it shows to the tokens and drops prefix keys",
    "test_tokenizer_peers.py::TestTokenizer::test_pretokenized_inputs": "SentencePiece takes each word for the start of a text",
    "test_tokenizer_peers.py::TestTokenizer::test_added_tokens_serialization": "the official files do not name the end token, so another one is not kept",
    "test_tokenizer_peers.py::TestTokenizer::test_chat_template_dict_saving": "a folder is read for one chat template, not for several",
    "test_tokenizer_peers.py::TestTokenizer::test_tokenizer_initialization_with_conflicting_key": "as in the official class, arguments it does not know are passed over",
    "test_peft_*peers.py::TestPeft::*Glora*": "GLoRA takes a plain torch.nn.Linear only, no class made of it",
    "test_peft_*peers.py::TestPeft::*Shadow*": "Shadow looks for .layers right below the backbone; here they are in .encoder",
    "test_peft_peers.py::TestPeft::test_prompt_learning_with_gradient_checkpointing[[]CPT*": "the test needs a data set of the hub",
    "test_peft_peers.py::TestPeft::test_prompt_learning_with_gradient_checkpointing[[]Prompt*": "the test needs a data set of the hub",
    "test_peft_peers.py::TestPeft::test_prefix_tuning_mistral": "the test needs a data set of the hub",
    "test_peft_peers.py::TestPeft::test_lora_embed_scale*": "the test is of the modules of Gemma",
    "test_peft_peers.py::TestPeft::test_lora_layer_replication": "the test is of the modules of Llama",
    "test_peft_peers.py::TestPeft::test_save_pretrained_targeting_lora_to_embedding_layer*": "the test is of the modules of Llama",
    "test_peft_peers.py::TestPeft::test_prompt_tuning_trust_remote_code": "the test is of the modules of OPT",
    "test_peft_peers.py::TestPeft::test_prefix_tuning_gemma4_*s_if_*": "the test is of the layers of Gemma 4",
    "test_peft_peers.py::TestPeft::test_merge_and_unload_fixes_tie*": "tied embeddings are refused: the architecture has none",
}
