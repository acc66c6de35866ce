"""The model class and the Auto classes, called the official way, give what load_model gives."""

import json
import shutil

import pytest
import torch
from conftest import TINY
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationConfig

from chatglm2.quantization import QuantizedLinear
from checkpoint import ChatGLMForConditionalGeneration, load_model, read_config, register_auto_classes, save_model

register_auto_classes()

INPUT_IDS = torch.arange(24)[None]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def logits(model):
    with torch.inference_mode():
        return model(INPUT_IDS).logits


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The tiny model as float, int8 and int4 folders, by bits."""
    folders = {0: TINY}
    for bits in (4, 8):
        folders[bits] = tmp_path_factory.mktemp("quantized") / f"int{bits}"
        folders[bits].mkdir()
        save_model(load_model(TINY, dtype=torch.float16, quantization_bit=bits), folders[bits])
    return folders


# ---- integer weights


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_an_integer_folder_through_automodel_answers_as_through_load_model(bits, dtype, folders):
    model = AutoModel.from_pretrained(folders[bits], dtype=dtype)
    assert model.transformer.encoder.layers[0].mlp.dense_h_to_4h.bits == bits
    assert model.config.quantization_bit == bits
    assert torch.equal(logits(model), logits(load_model(folders[bits], dtype=dtype)))


@pytest.mark.parametrize("bits", [4, 8])
def test_a_float_folder_is_quantized_as_its_configuration_asks(bits):
    config = AutoConfig.from_pretrained(TINY)
    config.quantization_bit = bits
    model = AutoModel.from_pretrained(TINY, config=config, dtype=torch.float32)
    assert torch.equal(logits(model), logits(load_model(TINY, quantization_bit=bits)))


@pytest.mark.parametrize("bits", [4, 8])
def test_a_model_built_from_an_integer_configuration_takes_the_folders_tensors(bits, folders):
    model = ChatGLMForConditionalGeneration(read_config(folders[bits])).eval()
    expected = load_model(folders[bits], quantization_backend="torch")
    model.load_state_dict(expected.state_dict())
    assert torch.equal(logits(model), logits(expected))


def test_a_model_built_from_an_integer_configuration_computes_with_finite_numbers():
    model = ChatGLMForConditionalGeneration(read_config(TINY, quantization_bit=8))
    assert isinstance(model.transformer.encoder.layers[0].mlp.dense_h_to_4h, QuantizedLinear)
    assert logits(model).isfinite().all()


def test_the_folders_configuration_and_another_width_are_an_error_that_names_the_tensor(folders):
    with pytest.raises(ValueError, match=r"is torch\.int8 .* but config\.json asks for"):
        AutoModel.from_pretrained(folders[8], config=read_config(folders[8], quantization_bit=4))


def test_a_saved_integer_model_loads_again(folders, tmp_path):
    model = AutoModel.from_pretrained(folders[4])
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModel.from_pretrained(tmp_path)), logits(model))


# ---- the prefix


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("projection", [False, True], ids=["no projection", "projection"])
@pytest.mark.parametrize("bits", [0, 4])
def test_a_prefix_configuration_gives_the_model_of_load_model(bits, projection, dtype, folders):
    config = read_config(folders[bits], pre_seq_len=4, prefix_projection=projection)
    torch.manual_seed(0)
    expected = load_model(folders[bits], config=config, dtype=dtype)
    torch.manual_seed(0)
    model = AutoModel.from_pretrained(folders[bits], config=config, dtype=dtype)
    assert torch.equal(logits(model), logits(expected))
    assert {parameter.dtype for parameter in model.transformer.prefix_encoder.parameters()} == {torch.float32}
    assert trainable(model) == trainable(expected)


def test_only_the_prefix_of_a_model_built_with_pre_seq_len_trains():
    model = ChatGLMForConditionalGeneration(read_config(TINY, pre_seq_len=4, prefix_projection=True))
    assert trainable(model) == {
        f"transformer.prefix_encoder.{name}"
        for name in ("embedding.weight", "trans.0.weight", "trans.0.bias", "trans.2.weight", "trans.2.bias")
    }


def test_an_own_training_step_leaves_the_base_as_it_is():
    model = AutoModel.from_pretrained(TINY, config=read_config(TINY, pre_seq_len=4), dtype=torch.float32).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(INPUT_IDS, labels=INPUT_IDS).loss.backward()
    optimizer.step()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"transformer.prefix_encoder.embedding.weight"}


def test_without_a_prefix_every_weight_trains_as_officially():
    model = AutoModel.from_pretrained(TINY)
    assert trainable(model) == {name for name, _ in model.named_parameters()}


def test_load_model_freezes_what_it_always_froze():
    assert trainable(load_model(TINY)) == set()


def test_a_prefix_saved_among_the_weights_is_loaded_with_them(tmp_path):
    model = AutoModel.from_pretrained(TINY, pre_seq_len=4, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModel.from_pretrained(tmp_path)), logits(model))


def test_a_prefix_among_the_weights_of_another_length_is_an_error(tmp_path):
    AutoModel.from_pretrained(TINY, pre_seq_len=4).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="prefix in .* does not fit this base model"):
        AutoModel.from_pretrained(tmp_path, config=read_config(tmp_path, pre_seq_len=5))


# ---- dtype, device


@pytest.mark.parametrize("dtype", [*DTYPES, "bfloat16", "torch.float16"], ids=str)
def test_any_dtype_gives_the_logits_of_load_model(dtype):
    expected = getattr(torch, dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    model = ChatGLMForConditionalGeneration.from_pretrained(TINY, dtype=dtype)
    assert model.dtype == model.config.dtype == expected
    assert torch.equal(logits(model), logits(load_model(TINY, dtype=expected)))


def test_without_a_dtype_the_one_of_config_json_holds():
    assert AutoModel.from_pretrained(TINY).dtype == torch.float16


def test_without_any_dtype_the_stored_one_holds(tmp_path):
    folder = shutil.copytree(TINY, tmp_path / "tiny")
    settings = json.loads((folder / "config.json").read_text())
    del settings["torch_dtype"]
    (folder / "config.json").write_text(json.dumps(settings))
    assert AutoModel.from_pretrained(folder).dtype == torch.float16


def test_a_dtype_that_is_none_is_an_error_that_says_what_to_give():
    with pytest.raises(ValueError, match=r"dtype is 'int8', expected such as torch\.float16"):
        ChatGLMForConditionalGeneration.from_pretrained(TINY, dtype="int8")


@pytest.mark.parametrize(
    "place",
    [
        {"device": "cpu"},
        {"device_map": "auto"},
        {"device_map": "cpu"},
        {"device_map": torch.device("cpu")},
        {"device_map": {"": "cpu"}},
        {"device_map": {"transformer.embedding": "cpu", "transformer": torch.device("cpu")}},
    ],
    ids=str,
)
def test_any_way_to_name_a_device_puts_the_model_there(place):
    if torch.cuda.is_available() and place == {"device_map": "auto"}:
        pytest.skip("auto takes the GPU")
    model = AutoModel.from_pretrained(TINY, dtype=torch.float32, **place)
    assert model.device.type == "cpu"
    assert torch.equal(logits(model), logits(load_model(TINY)))


@pytest.mark.parametrize("device_map", ["nowhere", {"": "nowhere"}, {"": [1]}], ids=str)
def test_a_device_map_that_is_none_is_an_error_that_says_what_to_give(device_map):
    with pytest.raises(ValueError, match=r"device_map is .*expected a device such as"):
        AutoModel.from_pretrained(TINY, device_map=device_map)


@pytest.mark.parametrize("place", [{"device": "cuda"}, {"device_map": {"": 0}}, {"device_map": "cuda:0"}])
def test_a_gpu_that_is_not_there_is_an_error_that_says_so(place, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"The model shall go to cuda.*no GPU here\. Give device="):
        AutoModel.from_pretrained(TINY, **place)


def test_a_device_map_that_forgets_a_part_is_an_error_that_names_it():
    places = {"transformer.encoder": "cpu", "transformer.embedding": "cuda:0"}
    with pytest.raises(ValueError, match=r"device_map does not say where transformer\.output_layer"):
        AutoModel.from_pretrained(TINY, device_map=places)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("bits", [0, 4])
def test_a_model_spread_over_devices_answers_alike(bits, folders):
    places = {"transformer": "cuda:0", "transformer.encoder.layers.1": "cpu", "transformer.output_layer": "cpu"}
    model = AutoModel.from_pretrained(folders[bits], dtype=torch.float32, device_map=places)
    expected = logits(load_model(folders[bits], device="cuda"))
    assert (logits(model).to("cuda") - expected).abs().max() < 1e-3 * expected.abs().max()


# ---- arguments


def test_the_official_arguments_are_accepted():
    model = AutoModel.from_pretrained(TINY, trust_remote_code=True, empty_init=False, device="cpu", dtype=torch.float32)
    assert torch.equal(logits(model), logits(load_model(TINY)))


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForCausalLM, ChatGLMForConditionalGeneration])
def test_settings_of_the_configuration_can_be_arguments(auto_class):
    model = auto_class.from_pretrained(TINY, pre_seq_len=4, quantization_bit=8)
    assert model.config.pre_seq_len == 4 and model.prefix_length == 4
    assert model.transformer.encoder.layers[0].mlp.dense_h_to_4h.bits == 8


def test_the_configuration_that_is_given_is_not_changed():
    config = read_config(TINY)
    before = config.to_dict()
    model = AutoModel.from_pretrained(TINY, config=config, dtype=torch.float32)
    assert config.to_dict() == before and model.config is not config


def test_a_wrong_setting_is_refused_as_in_config_json():
    with pytest.raises(ValueError, match="quantization_bit is 5"):
        ChatGLMForConditionalGeneration.from_pretrained(TINY, quantization_bit=5)


@pytest.mark.parametrize(
    ("argument", "replacement"),
    [
        ({"load_in_8bit": True}, "quantization_bit=4 or quantization_bit=8"),
        ({"gguf_file": "model.gguf"}, "the folder that holds"),
        ({"max_memory": {0: "1GB"}}, "a device_map"),
        ({"pre_sequence_length": 4}, "neither an argument nor a field"),
    ],
    ids=str,
)
def test_an_argument_of_no_effect_is_an_error_that_names_the_replacement(argument, replacement):
    with pytest.raises(TypeError, match=f"{next(iter(argument))}.*{replacement}"):
        ChatGLMForConditionalGeneration.from_pretrained(TINY, **argument)


def test_a_folder_with_a_missing_tensor_is_an_error_and_no_half_random_model(tmp_path):
    folder = shutil.copytree(TINY, tmp_path / "tiny")
    shard = folder / "pytorch_model-00001-of-00002.bin"
    tensors = torch.load(shard, weights_only=True)
    name = sorted(name for name in tensors if "layers" in name)[0]
    del tensors[name]
    torch.save(tensors, shard)
    with pytest.raises(ValueError, match="1 missing: " + name):
        AutoModel.from_pretrained(folder)


def test_the_loading_information_and_a_generation_configuration_can_be_asked_for():
    wanted = GenerationConfig(max_new_tokens=3)
    model, information = ChatGLMForConditionalGeneration.from_pretrained(
        TINY, output_loading_info=True, generation_config=wanted
    )
    assert model.generation_config.max_new_tokens == 3
    assert not any(information.values())


def test_a_model_can_be_saved_over_the_folder_that_it_came_from(tmp_path):
    AutoModel.from_pretrained(TINY).save_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(AutoModel.from_pretrained(tmp_path)), expected)


def test_a_folder_with_an_adapter_beside_the_weights_gives_the_model_without_it(tmp_path):
    folder = shutil.copytree(TINY, tmp_path / "tiny")
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "owner/elsewhere"}))
    model = ChatGLMForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(logits(model), logits(load_model(TINY)))


# ---- quantize


@pytest.mark.parametrize("bits", [4, 8])
def test_quantize_gives_the_model_that_is_quantized_while_it_is_read(bits):
    model = AutoModel.from_pretrained(TINY, dtype=torch.float16)
    assert model.quantize(bits) is model
    assert model.config.quantization_bit == bits
    assert torch.equal(logits(model), logits(load_model(TINY, dtype=torch.float16, quantization_bit=bits)))


def test_quantize_to_the_width_that_is_there_changes_nothing(folders):
    model = AutoModel.from_pretrained(folders[4])
    expected = logits(model)
    assert model.quantize(4) is model
    assert torch.equal(logits(model), expected)


def test_quantize_to_no_bits_changes_nothing():
    model = AutoModel.from_pretrained(TINY)
    assert model.quantize(0) is model and model.config.quantization_bit == 0


@pytest.mark.parametrize(("held", "bits"), [(4, 8), (8, 4)])
def test_quantize_to_another_width_is_an_error(held, bits, folders):
    with pytest.raises(ValueError, match=f"has int{held} weights already"):
        AutoModel.from_pretrained(folders[held]).quantize(bits)


def test_quantize_to_a_width_that_is_none_is_an_error():
    with pytest.raises(ValueError, match="bits is 5, expected 4 or 8"):
        AutoModel.from_pretrained(TINY).quantize(5)


def test_quantize_keeps_the_prefix_and_its_gradients():
    model = AutoModel.from_pretrained(TINY, pre_seq_len=4, dtype=torch.float32).quantize(4, empty_init=False).train()
    model(INPUT_IDS, labels=INPUT_IDS).loss.backward()
    assert trainable(model) == {"transformer.prefix_encoder.embedding.weight"}
    assert model.transformer.prefix_encoder.embedding.weight.grad.norm() > 0


def test_quantize_with_an_adapter_on_the_layers_is_an_error_that_says_to_merge_it():
    from peft import LoraConfig, get_peft_model

    model = load_model(TINY)
    get_peft_model(model, LoraConfig(r=2, target_modules=["query_key_value"]))
    with pytest.raises(ValueError, match="Merge a LoRA adapter first"):
        model.quantize(4)


# ---- trainers of others


def test_preferences_in_messages_train_through_trl(tmp_path):
    trl = pytest.importorskip("trl", reason="needs trl, of tests/requirements.txt")
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer

    answers = {
        name: [{"role": "assistant", "content": text}] for name, text in (("chosen", "很好"), ("rejected", "再见"))
    }
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": "你好"}], **answers}] * 2)
    settings = {"max_steps": 1, "logging_steps": 1, "save_strategy": "no", "report_to": "none", "use_cpu": True}
    trainer = trl.DPOTrainer(
        AutoModelForCausalLM.from_pretrained(TINY),
        args=trl.DPOConfig(str(tmp_path), bf16=False, disable_tqdm=True, **settings),
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(TINY),
        peft_config=LoraConfig(task_type="CAUSAL_LM"),
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.6931, abs=1e-3)  # ln 2: nothing is preferred yet
