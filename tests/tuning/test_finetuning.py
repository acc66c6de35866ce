"""Full, freeze, LoRA and none: what trains, what a checkpoint holds, who can open it, what is refused."""

import json

import pytest
import torch
from conftest import SAMPLE, TINY, relative_difference, synthetic_model
from support.finetuned import METHODS, TRAIN, run

import main
from chatglm2.modeling_chatglm import ChatGLMForConditionalGeneration
from checkpoint import load_model, load_tokenizer, read_config, save_model
from checkpoints.file_names import weight_files
from checkpoints.weight_files import read_tensors
from tuning.freeze import freeze_pattern
from tuning.methods import prepare_model, read_settings

PREDICT = {
    "do_predict": True,
    "test_file": SAMPLE / "dev.json",
    "max_predict_samples": 6,
    "max_target_length": 24,
    "per_device_eval_batch_size": 6,
    "do_sample": False,
    "disable_tqdm": True,
}
INPUT_IDS = torch.arange(3, 67).view(2, 32)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{method: (folder of a run of 4 steps with checkpoints 2 and 4, the trained model)}"""
    done = {}
    with pytest.MonkeyPatch.context() as patch:
        for method, flags in METHODS.items():
            folder = tmp_path_factory.mktemp(method.replace(" ", "-"))
            done[method] = folder, run(patch, TRAIN, output_dir=folder, **flags).model.eval()
    return done


@torch.inference_mode()
def logits(model):
    return model.eval()(INPUT_IDS.to(model.device)).logits


def opened(checkpoint, **how):
    """A model that answers with what a checkpoint holds, as the programs load it."""
    saved = read_settings([checkpoint])
    folder = checkpoint if saved["finetuning_type"] == "full" else saved["base_model"]
    model = load_model(folder, quantization_bit=saved.get("quantization_bit") or None)
    prepare_model(model, saved["finetuning_type"], saved["checkpoints"], **how)
    return model


def predictions(folder):
    lines = (folder / "generated_predictions.txt").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["predict"] for line in lines]


# ---- what trains


def should_change(method, name):
    freeze = freeze_pattern(4, METHODS["freeze"]["num_layer_trainable"], "mlp")
    return {"full": True, "freeze": bool(freeze.fullmatch(name)), "lora": False, "int4 lora": False}[method]


@pytest.mark.parametrize("method", METHODS)
def test_exactly_what_should_train_changes(runs, method):
    before = load_model(TINY, quantization_bit=METHODS[method].get("quantization_bit")).state_dict()
    after = {name.replace(".base_layer.", "."): tensor for name, tensor in runs[method][1].state_dict().items()}
    assert before.keys() == {name for name in after if "lora_" not in name}
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed == {name for name in before if should_change(method, name)}
    adapter = {name: tensor for name, tensor in after.items() if "lora_B" in name}
    assert len(adapter) == {"full": 0, "freeze": 0, "lora": 16, "int4 lora": 4}[method]
    assert all(tensor.count_nonzero() for tensor in adapter.values())  # all zeros before the first step


@pytest.mark.parametrize(
    ("num_layer_trainable", "expected"), [(3, [25, 26, 27]), (-2, [0, 1]), (1, [27]), (28, list(range(28)))]
)
@pytest.mark.parametrize(
    ("module", "tensors"),
    [
        ("mlp", ["mlp.dense_h_to_4h.weight", "mlp.dense_4h_to_h.weight"]),
        ("qkv", ["self_attention.query_key_value.weight", "self_attention.query_key_value.bias"]),
    ],
)
def test_freeze_trains_one_module_of_exactly_n_layers(num_layer_trainable, expected, module, tensors):
    with torch.device("meta"):
        names = ChatGLMForConditionalGeneration(read_config(TINY, num_layers=28)).state_dict()
    pattern = freeze_pattern(28, num_layer_trainable, module)
    wanted = {f"transformer.encoder.layers.{layer}.{name}" for layer in expected for name in tensors}
    assert {name for name in names if pattern.fullmatch(name)} == wanted


@pytest.mark.parametrize("method", ["full", "freeze"])
def test_what_trains_lies_as_optimizers_and_engines_expect(monkeypatch, method):
    monkeypatch.setattr("chatglm2.matmul.ONEDNN", True)  # whose weights lie otherwise
    model = load_model(TINY)
    assert not all(parameter.is_contiguous() for parameter in model.parameters())
    prepare_model(model, method, do_train=True)
    assert all(parameter.is_contiguous() for parameter in model.parameters() if parameter.requires_grad)


def plain_loss(weights, config, input_ids, labels):
    """The loss of ChatGLM2 without padding, cache or prefix, written once more, from the weights by name."""
    functional = torch.nn.functional

    def norm(x, name):
        return x * (x.pow(2).mean(-1, keepdim=True) + config.layernorm_epsilon).rsqrt() * weights[f"{name}.weight"]

    def rotate(x):  # (B, S, heads, D): the first half of the channels, in neighbouring pairs
        half = x.shape[-1] // 2
        angles = torch.arange(x.shape[1])[:, None] * 10000.0 ** (-torch.arange(0, half, 2) / half)
        turned = torch.view_as_complex(x[..., :half].unflatten(-1, (-1, 2)).contiguous())
        turned = turned * torch.polar(torch.ones_like(angles), angles)[None, :, None].to(turned.dtype)
        return torch.cat((torch.view_as_real(turned).flatten(-2), x[..., half:]), -1)

    heads, groups, channels = config.num_attention_heads, config.num_key_value_heads, config.kv_channels
    batch, length = input_ids.shape
    x = weights["transformer.embedding.word_embeddings.weight"][input_ids]
    for number in range(config.num_layers):
        layer = f"transformer.encoder.layers.{number}."
        mixed = norm(x, layer + "input_layernorm") @ weights[layer + "self_attention.query_key_value.weight"].T
        mixed = (mixed + weights[layer + "self_attention.query_key_value.bias"]).unflatten(-1, (-1, channels))
        query, key, value = mixed.split((heads, groups, groups), dim=2)
        key, value = (part.repeat_interleave(heads // groups, dim=2) for part in (rotate(key), value))
        scores = torch.einsum("bqhd,bkhd->bhqk", rotate(query), key) / channels**0.5
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
        context = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value).flatten(2)
        x = x + context @ weights[layer + "self_attention.dense.weight"].T
        gate, up = (norm(x, layer + "post_attention_layernorm") @ weights[layer + "mlp.dense_h_to_4h.weight"].T).chunk(
            2, -1
        )
        x = x + (functional.silu(gate) * up) @ weights[layer + "mlp.dense_4h_to_h.weight"].T
    scores = norm(x, "transformer.encoder.final_layernorm") @ weights["transformer.output_layer.weight"].T
    return functional.cross_entropy(scores[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_full_gradients_equal_those_of_a_plain_forward(checkpointing):
    model = synthetic_model(pre_seq_len=None)
    prepare_model(model, "full", do_train=True)
    if checkpointing:
        model.gradient_checkpointing_enable()
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(3, model.config.padded_vocab_size, (3, 20), generator=generator)
    labels = input_ids.masked_fill(torch.arange(20) < 8, -100)
    loss = model.train()(input_ids, labels=labels).loss
    loss.backward()
    weights = {name: tensor.detach().double().requires_grad_() for name, tensor in model.state_dict().items()}
    expected = plain_loss(weights, model.config, input_ids, labels)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert gradients.keys() == weights.keys()
    for name, gradient in gradients.items():
        assert relative_difference(gradient, weights[name].grad) < 1e-4, name


# ---- what a checkpoint holds


def test_a_full_checkpoint_opens_as_a_base_model_with_equal_logits(runs):
    folder, model = runs["full"]
    checkpoint = folder / "checkpoint-4"
    assert torch.equal(logits(load_model(checkpoint)), logits(model))
    stored = {name for file in weight_files(checkpoint) for name, _ in read_tensors(file)}
    official = {name for file in weight_files(TINY) for name, _ in read_tensors(file)}
    assert stored == official | {"transformer.rotary_pos_emb.inv_freq"}
    config = json.loads((checkpoint / "config.json").read_text())
    base = json.loads((TINY / "config.json").read_text())
    assert config == {**base, "torch_dtype": "float32"}
    assert load_tokenizer(checkpoint, read_config(checkpoint)).encode("裙") == load_tokenizer(
        TINY, read_config(TINY)
    ).encode("裙")


def test_a_model_larger_than_a_shard_is_written_in_several_files_with_an_index(runs, tmp_path):
    save_model(runs["full"][1], tmp_path, max_shard_size="2MB")
    index = json.loads((tmp_path / "pytorch_model.bin.index.json").read_text())
    files = sorted(path.name for path in tmp_path.glob("*.bin"))
    assert len(files) > 2 and files == sorted(set(index["weight_map"].values()))
    assert files[0] == f"pytorch_model-00001-of-{len(files):05}.bin"
    assert torch.equal(logits(load_model(tmp_path)), logits(runs["full"][1]))


def test_a_freeze_checkpoint_holds_the_trained_tensors_only(runs):
    folder, model = runs["freeze"]
    tensors = dict(read_tensors(folder / "checkpoint-4" / "pytorch_model.bin"))
    assert tensors.keys() == {name for name in model.state_dict() if should_change("freeze", name)}
    assert torch.equal(logits(opened(folder / "checkpoint-4")), logits(model))


def test_an_adapter_opens_in_peft_itself_with_equal_logits(runs):
    from peft import PeftModel

    folder, model = runs["lora"]
    adapted = PeftModel.from_pretrained(load_model(TINY), folder / "checkpoint-4")
    assert torch.equal(logits(adapted), logits(model))
    config = json.loads((folder / "checkpoint-4" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (8, 32, 0.1)
    assert config["base_model_name_or_path"] == str(TINY)


def test_a_merged_adapter_answers_as_it_did_in_training(runs):
    folder, model = runs["lora"]
    merged = opened(folder / "checkpoint-4")
    assert not any("lora_" in name for name in merged.state_dict())
    assert relative_difference(logits(merged), logits(model)) < 1e-5


def test_an_adapter_of_integer_weights_stays_beside_them(runs):
    folder, model = runs["int4 lora"]
    adapted = opened(folder / "checkpoint-4")
    assert any("lora_" in name for name in adapted.state_dict())
    assert torch.equal(logits(adapted), logits(model))


def test_an_adapter_that_peft_wrote_in_2023_opens_without_a_sidecar(runs, tmp_path):
    folder, model = runs["lora"]
    from safetensors.torch import load_file

    torch.save(load_file(folder / "checkpoint-4" / "adapter_model.safetensors"), tmp_path / "adapter_model.bin")
    names = ("peft_type", "task_type", "r", "lora_alpha", "lora_dropout", "target_modules", "base_model_name_or_path")
    config = json.loads((folder / "checkpoint-4" / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({name: config[name] for name in names}))
    assert relative_difference(logits(opened(tmp_path)), logits(model)) < 1e-5


def test_several_adapters_are_merged_in_order(runs):
    first, second = (runs["lora"][0] / f"checkpoint-{step}" for step in (2, 4))
    model = load_model(TINY)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    prepare_model(model, "lora", [first, second])
    changes = [
        {name: tensor - base[name] for name, tensor in opened(folder).state_dict().items()}
        for folder in (first, second)
    ]
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, base[name] + changes[0][name] + changes[1][name])


def test_a_new_adapter_on_a_merged_one_remembers_it(runs, monkeypatch, tmp_path):
    first = runs["lora"][0] / "checkpoint-4"
    settings = {**TRAIN, **METHODS["int4 lora"], "quantization_bit": None, "resume_lora_training": False}
    trained = run(monkeypatch, settings, ptuning_checkpoint=first, output_dir=tmp_path, max_steps=2).model
    assert read_settings([tmp_path / "checkpoint-2"])["checkpoints"] == [str(first), tmp_path / "checkpoint-2"]
    assert relative_difference(logits(opened(tmp_path / "checkpoint-2")), logits(trained)) < 1e-5


def test_an_adapter_trains_on(runs, monkeypatch, tmp_path):
    first = runs["lora"][0] / "checkpoint-4"
    trainer = run(
        monkeypatch, {**TRAIN, "finetuning_type": "lora"}, checkpoint_dir=first, output_dir=tmp_path, max_steps=2
    )
    later = dict(read_tensors(tmp_path / "checkpoint-2" / "adapter_model.safetensors"))
    earlier = dict(read_tensors(first / "adapter_model.safetensors"))
    assert later.keys() == earlier.keys()
    assert all(0 < relative_difference(later[name], earlier[name]) < 0.9 for name in later if "lora_A" in name)
    assert relative_difference(logits(opened(tmp_path / "checkpoint-2")), logits(trainer.model)) < 1e-5


# ---- resuming, evaluating, serving


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_ends_as_the_uninterrupted_one(runs, monkeypatch, tmp_path, method):
    folder, model = runs[method]
    resumed = run(
        monkeypatch, TRAIN, output_dir=tmp_path, resume_from_checkpoint=folder / "checkpoint-2", **METHODS[method]
    ).model
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


@pytest.mark.parametrize("method", METHODS)
def test_evaluation_and_the_demos_need_the_checkpoint_only_and_agree(runs, monkeypatch, tmp_path, method):
    from support.chat_server import finish, open_server

    from serving.server import Sampling

    checkpoint = runs[method][0] / "checkpoint-4"
    run(monkeypatch, PREDICT, ptuning_checkpoint=checkpoint, output_dir=tmp_path)
    server = open_server("--checkpoint_dir", checkpoint)
    assert server.models() == ["checkpoint-4"] and server.facts("checkpoint-4")["base_model"] == "tiny"
    rows = [json.loads(line) for line in (SAMPLE / "dev.json").read_text(encoding="utf-8").splitlines()[:6]]
    for row, answer in zip(rows, predictions(tmp_path), strict=True):
        served = finish(server, row["content"], sampling=Sampling(max_new_tokens=24, temperature=0)).text
        assert served.startswith(answer) or answer.startswith(served)
    server.close()


def test_none_is_the_base_with_the_settings_of_the_checkpoint(runs, monkeypatch, tmp_path):
    checkpoint = runs["full"][0] / "checkpoint-4"
    run(monkeypatch, PREDICT, finetuning_type="none", ptuning_checkpoint=checkpoint, output_dir=tmp_path / "none")
    columns = {"prompt_column": "content", "response_column": "summary", "max_source_length": 64}
    run(monkeypatch, {**PREDICT, **columns}, model_name_or_path=TINY, output_dir=tmp_path / "base")
    run(monkeypatch, PREDICT, ptuning_checkpoint=checkpoint, output_dir=tmp_path / "full")
    assert predictions(tmp_path / "none") == predictions(tmp_path / "base") != predictions(tmp_path / "full")


# ---- refusals

REFUSALS = {
    "full with integer weights": ("full", {"quantization_bit": 4}, "int4 weights cannot be trained"),
    "freeze with integer weights": ("freeze", {"quantization_bit": 8}, "some of the weights themselves, .* int8"),
    "none with training": ("none", {}, "none trains nothing"),
    "a prefix length with LoRA": ("lora", {"pre_seq_len": 8}, "--pre_seq_len 8 belongs to --finetuning_type p_tuning"),
    "a prefix length with full": ("full", {"pre_seq_len": 8}, "--pre_seq_len 8 belongs to --finetuning_type p_tuning"),
    "projection with freeze": ("freeze", {"prefix_projection": True}, "belongs to --finetuning_type p_tuning"),
    "a rank without LoRA": ("full", {"lora_rank": 4}, "--lora_rank 4 belongs to --finetuning_type lora"),
    "a rank with a prefix": (
        None,
        {"pre_seq_len": 8, "lora_rank": 4},
        "belongs to --finetuning_type lora, .* p_tuning",
    ),
    "layers without freeze": ("lora", {"num_layer_trainable": 2}, "belongs to --finetuning_type freeze"),
    "no layer": ("freeze", {"num_layer_trainable": 0}, "--num_layer_trainable 0 trains nothing"),
    "too many layers": ("freeze", {"num_layer_trainable": -5}, "-5: this base model has 4 layers"),
    "an unknown module": ("freeze", {"name_module_trainable": "dense"}, "name_module_trainable"),
    "an unknown target": ("lora", {"lora_target": "query_key_value,q_proj"}, "expected some of query_key_value,dense,"),
    "rank 0": ("lora", {"lora_rank": 0}, "--lora_rank 0: expected at least 1"),
    "dropout 1": ("lora", {"lora_dropout": 1}, "--lora_dropout 1.0: expected from 0 up to"),
    "an unknown method": ("qlora", {}, "finetuning_type"),
    "DeepSpeed with LoRA": ("lora", {"deepspeed": "ptuning/deepspeed.json"}, "Leave --deepspeed out"),
    "DeepSpeed with no way named": (
        None,
        {"pre_seq_len": None, "deepspeed": "ptuning/deepspeed.json"},
        "as the official ds_train_finetune.sh, give --finetuning_type full",
    ),
    "FSDP with a prefix": (None, {"pre_seq_len": 8, "fsdp": "full_shard"}, "Leave --fsdp out"),
    "official precision": ("lora", {"precision": "official"}, "--precision official is how .* train a prefix"),
    "both engines": ("full", {"deepspeed": "x.json", "fsdp": "full_shard"}, "give one of them"),
    "an engine that would generate": (
        "full",
        {"fsdp": "full_shard", "do_predict": True, "test_file": SAMPLE / "dev.json"},
        "--fsdp is for training only",
    ),
}


def refuse_to_load(*args, **kwargs):
    raise AssertionError("the model is read")


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_work_is_refused_by_name_before_the_model_is_read(monkeypatch, tmp_path, case):
    method, flags, message = REFUSALS[case]
    monkeypatch.setattr(main, "load_model", refuse_to_load)
    with pytest.raises(ValueError, match=message):
        run(monkeypatch, TRAIN, finetuning_type=method, output_dir=tmp_path, **flags)


CHECKPOINT_REFUSALS = {
    "another method": ("full", TRAIN, {"finetuning_type": "lora"}, "--finetuning_type lora contradicts .*with full"),
    "several of another kind": ("freeze", PREDICT, {"twice": True}, "for LoRA adapters only; found .*: freeze, .*"),
    "several on integers": ("int4 lora", PREDICT, {"twice": True}, "2 adapters cannot be used on an int4 base"),
    "a merge into integers": (
        "int4 lora",
        TRAIN,
        {"resume_lora_training": False},
        "--resume_lora_training false cannot be used on an int4",
    ),
    "other layers": ("freeze", TRAIN, {"num_layer_trainable": 1}, "--num_layer_trainable 1 contradicts"),
    "another rank": ("lora", TRAIN, {"lora_rank": 4}, "--lora_rank 4 contradicts .* trained with 8"),
    "integers under tuned floats": ("freeze", PREDICT, {"quantization_bit": 8}, "they are int8 here"),
    "an adapter as a base": (
        "lora",
        TRAIN,
        {"as_base": True, "pre_seq_len": 4},
        "not a base model. .*--ptuning_checkp",
    ),
}


@pytest.mark.parametrize("case", CHECKPOINT_REFUSALS)
def test_what_contradicts_a_checkpoint_is_refused_before_the_model_is_read(runs, monkeypatch, tmp_path, case):
    method, settings, flags, message = CHECKPOINT_REFUSALS[case]
    flags, checkpoint = dict(flags), runs[method][0] / "checkpoint-4"
    if flags.pop("twice", False):
        flags["ptuning_checkpoint"] = f"{checkpoint},{checkpoint}"
    elif flags.pop("as_base", False):
        flags["model_name_or_path"] = str(checkpoint)
        (checkpoint / "config.json").write_text((TINY / "config.json").read_text())
    else:
        flags["ptuning_checkpoint"] = checkpoint
    monkeypatch.setattr(main, "load_model", refuse_to_load)
    with pytest.raises(ValueError, match=message):
        run(monkeypatch, settings, output_dir=tmp_path, **flags)


def test_a_quantized_folder_is_refused_for_full(monkeypatch, tmp_path):
    for file in TINY.iterdir():
        if file.suffix in (".json", ".model", ".bin"):
            (tmp_path / file.name).symlink_to(file)
    (tmp_path / "config.json").unlink()
    config = json.loads((TINY / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_bit": 4}))
    monkeypatch.setattr(main, "load_model", refuse_to_load)
    with pytest.raises(ValueError, match="int4 weights cannot be trained"):
        run(monkeypatch, TRAIN, finetuning_type="full", model_name_or_path=tmp_path, output_dir=tmp_path / "out")


def test_a_run_resumes_with_its_own_method_only(runs, monkeypatch, tmp_path):
    settings = {**TRAIN, "resume_from_checkpoint": runs["lora"][0] / "checkpoint-2"}
    with pytest.raises(
        ValueError, match="--finetuning_type full contradicts .*checkpoint-2, which was trained with lora"
    ):
        run(monkeypatch, settings, finetuning_type="full", output_dir=tmp_path)


def test_an_adapter_of_another_model_names_the_tensor_that_differs(runs):
    model = synthetic_model(pre_seq_len=None)
    with pytest.raises(
        ValueError, match="does not fit this base model: .* tensors differ, such as transformer.encoder"
    ):
        prepare_model(model, "lora", [runs["lora"][0] / "checkpoint-4"])
