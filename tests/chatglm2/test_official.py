"""--precision official is the recipe of the official scripts: compared with their figures and restated step by step."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import SYNTHETIC, TINY, relative_difference, synthetic_model
from support.runs import TRAIN_SETTINGS, losses, run

from arguments import parse_arguments
from chatglm2.configuration_chatglm import ChatGLMConfig
from chatglm2.official_recipe import OfficialAdamW, official_loss, prefix_in_official_order
from chatglm2.prefix_encoder import PrefixEncoder
from checkpoint import choose_dtype, load_model, read_config
from trainer import PrefixTrainer
from training.precision import set_precision

INPUT_IDS, LABELS = torch.tensor(SYNTHETIC["input_ids"]), torch.tensor(SYNTHETIC["labels"])


# ---- the model


def test_in_float32_loss_and_prefix_gradient_equal_the_official_figures():
    model = synthetic_model()
    loss = official_loss(model, INPUT_IDS, LABELS)
    loss.backward()
    assert loss.item() == pytest.approx(SYNTHETIC["loss"], rel=2e-5)
    gradient = model.transformer.prefix_encoder.embedding.weight.grad
    assert relative_difference(gradient, torch.tensor(SYNTHETIC["prefix_grad"]).view_as(gradient)) < 2e-4


def restated_loss(model, input_ids, labels, dtype):
    """The official forward on one batch, written down once more: row by row, head by head, plain attention."""
    weights = {name: tensor.to(dtype) for name, tensor in model.state_dict().items() if "prefix" not in name}
    table = model.transformer.prefix_encoder.embedding.weight
    config = model.config
    heads, groups, channels = config.num_attention_heads, config.num_key_value_heads, config.kv_channels

    def rms(x, name):
        wide = x.float()
        return (wide / (wide.square().mean(-1, keepdim=True) + config.layernorm_epsilon).sqrt() * weights[name]).to(
            dtype
        )

    def linear(x, name):
        return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def turn(x):  # (S, channels)
        angles = [[s / 10000 ** (2 * i / (channels // 2)) for i in range(channels // 4)] for s in range(len(x))]
        cos, sin = torch.tensor(angles).cos().to(dtype), torch.tensor(angles).sin().to(dtype)
        result = list(x.unbind(1))
        for i in range(channels // 4):
            a, b = x[:, 2 * i], x[:, 2 * i + 1]
            result[2 * i], result[2 * i + 1] = a * cos[:, i] - b * sin[:, i], b * cos[:, i] + a * sin[:, i]
        return torch.stack(result, 1)

    all_logits = []
    for ids in input_ids:
        prefix = table.to(dtype).view(len(table), config.num_layers, 2, groups, channels)
        x = weights["transformer.embedding.word_embeddings.weight"][ids]
        look = torch.ones(len(ids), len(table) + len(ids), dtype=torch.bool).tril(len(table))
        for index in range(config.num_layers):
            name = f"transformer.encoder.layers.{index}"
            mixed = linear(rms(x, f"{name}.input_layernorm.weight"), f"{name}.self_attention.query_key_value")
            mixed = mixed.view(len(ids), heads + 2 * groups, channels)
            outputs = []
            for head in range(heads):
                group = head // (heads // groups)
                key = torch.cat((prefix[:, index, 0, group], turn(mixed[:, heads + group])))
                value = torch.cat((prefix[:, index, 1, group], mixed[:, heads + groups + group]))
                scores = turn(mixed[:, head]).float() @ key.float().T / channels**0.5
                outputs.append((scores.masked_fill(~look, -math.inf).softmax(-1) @ value.float()).to(dtype))
            x = x + linear(torch.cat(outputs, 1), f"{name}.self_attention.dense")
            gate, value = linear(rms(x, f"{name}.post_attention_layernorm.weight"), f"{name}.mlp.dense_h_to_4h").chunk(
                2, 1
            )
            x = x + linear(F.silu(gate) * value, f"{name}.mlp.dense_4h_to_h")
        x = rms(x, "transformer.encoder.final_layernorm.weight")
        all_logits.append(linear(x, "transformer.output_layer").float())
    logits = torch.stack(all_logits)[:, :-1]
    chosen = labels[:, 1:] != -100
    return F.cross_entropy(logits[chosen], labels[:, 1:][chosen]).to(dtype)


def test_in_float16_loss_and_prefix_gradient_equal_a_restatement_within_its_rounding():
    # Attention and matrix products round differently in another order: equal within float16, not bit for bit.
    model = synthetic_model().half()
    model.transformer.prefix_encoder.float()
    embedding = model.transformer.prefix_encoder.embedding.weight
    gradients, values = [], []
    for loss in (official_loss(model, INPUT_IDS, LABELS), restated_loss(model, INPUT_IDS, LABELS, torch.float16)):
        assert loss.dtype == torch.float16
        embedding.grad = None
        loss.backward()
        gradients.append(embedding.grad.clone())
        values.append(loss.item())
    assert values[0] == pytest.approx(values[1], rel=2**-10)  # the loss itself: one unit of its last place
    assert relative_difference(gradients[0], gradients[1]) < 1e-2


def test_nothing_rescues_a_gradient_that_float16_cannot_hold():
    model = synthetic_model().half()
    model.transformer.prefix_encoder.float()
    loss = official_loss(model, INPUT_IDS, LABELS)
    loss.backward(torch.tensor(2.0**-16, dtype=torch.float16))  # as if the batch had 65,536 times as many tokens
    gradient = model.transformer.prefix_encoder.embedding.weight.grad
    assert (gradient == 0).float().mean() > 0.1


def test_gradient_checkpointing_changes_nothing():
    gradients = []
    for enabled in (False, True):
        model = synthetic_model().half().train()
        model.transformer.prefix_encoder.float()
        if enabled:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        official_loss(model, INPUT_IDS, LABELS).backward()
        gradients.append(model.transformer.prefix_encoder.embedding.weight.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("projection", [False, True])
def test_the_prefix_is_cast_to_float16_and_then_dropped_out_in_the_official_order(projection):
    config = ChatGLMConfig(
        num_layers=3, hidden_size=16, kv_channels=4, multi_query_attention=True, multi_query_group_num=2,
        num_attention_heads=4, pre_seq_len=5, prefix_projection=projection, prefix_dropout=0.3,
    )  # fmt: skip
    encoder = PrefixEncoder(config)
    torch.manual_seed(7)
    found = prefix_in_official_order(encoder, 2, torch.float16, training=True)
    torch.manual_seed(7)
    rows = encoder.embedding(torch.arange(5).repeat(2, 1))
    rows = (encoder.trans(rows) if projection else rows).half()
    expected = torch.dropout(rows.reshape(2, 5, 6, 2, 4), 0.3, True).permute(2, 1, 0, 3, 4)
    assert torch.equal(torch.stack(found), expected)
    assert (expected == 0).any()


# ---- the steps


def restated_adamw(weight, gradient, state, lr, betas=(0.9, 0.999), eps=1e-8):
    """One step of transformers 4.30's AdamW without weight decay, as new tensors."""
    step = state.get("step", 0) + 1
    mean = state.get("mean", torch.zeros_like(weight)) * betas[0] + gradient * (1 - betas[0])
    square = state.get("square", torch.zeros_like(weight)) * betas[1] + gradient * gradient * (1 - betas[1])
    state.update(step=step, mean=mean, square=square)
    return weight - lr * math.sqrt(1 - betas[1] ** step) / (1 - betas[0] ** step) * mean / (square.sqrt() + eps)


def test_a_small_gradient_moves_the_prefix_less_than_with_todays_adamw(tmp_path):
    # eps weighs 30 times more in the first step, so tiny gradients do not make full steps of the learning rate.
    _, _, args, _ = parse_arguments(["--do_train", "--train_file", "a", "--output_dir", str(tmp_path), *COMMON])
    moved = []
    for make in (
        lambda layer: OfficialAdamW(layer, args),
        lambda layer: torch.optim.AdamW(layer.parameters(), lr=args.learning_rate),
    ):
        layer = torch.nn.Linear(1, 1, bias=False)
        before = layer.weight.detach().clone()
        layer.weight.grad = torch.full_like(layer.weight, 1e-8)
        make(layer).step()
        moved.append((before - layer.weight).abs().item() / args.learning_rate)
    assert moved[0] == pytest.approx(1 / (1 + 1e-8 / (1e-8 * math.sqrt(1e-3))), rel=0.05)
    assert moved[1] == pytest.approx(0.5, rel=0.05)


COMMON = [
    "--prompt_column",
    "content",
    "--response_column",
    "summary",
    "--model_name_or_path",
    str(TINY),
    "--pre_seq_len",
    "8",
]
SETTINGS = {
    **TRAIN_SETTINGS,
    "precision": "official",
    "per_device_train_batch_size": 2,
    "max_target_length": 16,
    "max_steps": 4,
    "save_steps": 2,
    "learning_rate": 1e-2,
}


@pytest.mark.slow
def test_a_run_equals_the_recipe_restated_step_by_step(monkeypatch, tmp_path, capsys):
    # Bit for bit, given the loss of a batch: float16 loss, its division, clipping, AdamW, schedule, the logged mean.
    batches, starts = [], {}
    honest = PrefixTrainer.training_step

    def training_step(self, model, inputs, num_items_in_batch=None):
        if not batches:
            starts["prefix"] = self.model.transformer.prefix_encoder.embedding.weight.detach().clone()
        assert num_items_in_batch is None and self.accelerator.scaler is None
        batches.append((torch.get_rng_state(), {name: inputs[name].clone() for name in ("input_ids", "labels")}))
        return honest(self, model, inputs, num_items_in_batch)

    monkeypatch.setattr(PrefixTrainer, "training_step", training_step)
    run(monkeypatch, SETTINGS, output_dir=tmp_path)
    assert "Weights: float16 on cpu (--precision official: no loss scaling" in capsys.readouterr().out

    config = read_config(TINY, pre_seq_len=8, prefix_dropout=0.1)
    model = load_model(TINY, config=config, dtype=torch.float16).train()
    prefix = model.transformer.prefix_encoder.embedding.weight
    prefix.data.copy_(starts["prefix"])
    state, logged = {}, []
    assert len(batches) == 8
    for step in range(4):
        sum_of_losses = torch.tensor(0.0)
        for random_state, batch in batches[2 * step : 2 * step + 2]:
            assert batch["input_ids"].shape == (2, 64 + 16 + 1)
            torch.set_rng_state(random_state)
            loss = official_loss(model, **batch)
            assert loss.dtype == torch.float16
            loss = loss / 2  # in float16
            loss.backward()
            sum_of_losses += loss.detach()
        logged.append(sum_of_losses.item())
        norm = prefix.grad.square().sum().sqrt()
        gradient = prefix.grad * min(1.0, 1.0 / (norm.item() + 1e-6))
        learning_rate = 1e-2 * (4 - step) / 4
        prefix.data = restated_adamw(prefix.data, gradient, state, learning_rate)
        prefix.grad = None
    assert losses(tmp_path) == logged
    saved = torch.load(tmp_path / "checkpoint-4" / "pytorch_model.bin", weights_only=True)
    assert torch.allclose(
        next(iter(saved.values())), prefix.data, rtol=1e-6, atol=1e-7
    )  # float32 formulas, fused or not


@pytest.mark.slow
def test_an_interrupted_run_resumes_bit_for_bit_and_is_not_the_default_one(monkeypatch, tmp_path):
    run(monkeypatch, SETTINGS, output_dir=tmp_path / "run")
    whole = losses(tmp_path / "run")
    run(monkeypatch, SETTINGS, output_dir=tmp_path / "run", resume_from_checkpoint=tmp_path / "run" / "checkpoint-2")
    assert losses(tmp_path / "run") == whole
    run(monkeypatch, SETTINGS, precision="auto", output_dir=tmp_path / "default")
    assert losses(tmp_path / "default") != whole
    assert losses(tmp_path / "default") == pytest.approx(whole, rel=0.1)


@pytest.mark.parametrize("bits", [4, 8])
def test_integer_weights_train_under_the_official_recipe_too(bits, monkeypatch, tmp_path):
    run(
        monkeypatch,
        SETTINGS,
        quantization_bit=bits,
        max_train_samples=4,
        gradient_accumulation_steps=1,
        output_dir=tmp_path,
    )
    assert losses(tmp_path)[-1] < losses(tmp_path)[0]


# ---- the choice


def test_a_gpu_takes_the_same_path(tmp_path):
    # Nothing of official_recipe.py asks for the device; what does, is the dtype and the Trainer's loss scaling.
    assert choose_dtype("cuda", official=True) == choose_dtype("cpu", official=True)
    assert choose_dtype("cuda", official=True)[0] == torch.float16
    words = ["--do_train", "--train_file", "a", "--output_dir", str(tmp_path), "--precision", "official", *COMMON]
    _, _, args, _ = parse_arguments(words)
    set_precision(args, "p_tuning")
    assert (args.fp16, args.bf16, args.mixed_precision) == (False, False, "no")


@pytest.mark.parametrize("flag", ["fp16", "bf16", "fp16_full_eval", "auto_find_batch_size"])
def test_a_second_precision_is_refused(flag, tmp_path):
    words = ["--do_train", "--train_file", "a", "--output_dir", str(tmp_path), "--precision", "official", f"--{flag}"]
    with pytest.raises(ValueError, match=f"--precision official and --{flag} contradict"):
        parse_arguments([*words, *COMMON])
