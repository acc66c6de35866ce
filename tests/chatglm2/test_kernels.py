"""The fused kernels against plain torch: on a GPU where there is one, else in Triton's interpreter on a CPU."""

import pytest
import torch
from conftest import relative_difference, synthetic_model
from support.machine_code import SHARED_MEMORY, machine_code

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
triton = pytest.importorskip("triton", reason="triton is not installed (torch's build for CPUs comes without it)")
if not ON_GPU and tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7):
    pytest.skip("the interpreter of Triton before 3.7 runs no loops with NumPy 2.4 and later", allow_module_level=True)

from chatglm2 import kernels, kernels_triton  # noqa: E402
from chatglm2.generation import answer_prompts  # noqa: E402
from chatglm2.kernels import Kernels  # noqa: E402

TRITON = Kernels(**{name: getattr(kernels_triton, name) for name in Kernels._fields})
# The interpreter keeps bfloat16 as raw bits, cuts where a GPU rounds, and multiplies the bits as integers.
dtypes = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, *([torch.bfloat16] if ON_GPU else [])], ids=str
)
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def assert_equal(name, *arguments):
    """The kernel gives the reference's results, in their dtypes and shapes."""
    given, wanted = (function(*arguments) for function in (getattr(kernels_triton, name), getattr(kernels, name)))
    given, wanted = ([x] if isinstance(x, torch.Tensor) else x for x in (given, wanted))
    for ours, theirs in zip(given, wanted, strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        assert relative_difference(ours.cpu(), theirs.cpu()) < TOLERANCE[arguments[0].dtype]


@dtypes
@pytest.mark.parametrize("rows, columns", [(1, 1), (3, 37), (64, 130), (2, 1100)])
def test_swiglu_and_its_gradient(rows, columns, dtype):
    gate_value, gradient = draw(rows, 2 * columns, dtype=dtype), draw(rows, columns, dtype=dtype, seed=1)
    assert_equal("swiglu", gate_value)
    assert_equal("swiglu_backward", gradient, gate_value)


def angles(rows, length, channels, dtype):
    turns = draw(rows, 1, length, channels // 4, seed=2)
    return turns.cos().to(dtype), turns.sin().to(dtype)


@dtypes
@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize(
    "rows, of_rows, heads, length, channels", [(1, 1, 1, 1, 4), (3, 1, 11, 5, 12), (2, 2, 6, 9, 32)]
)
def test_rotation_of_a_part_of_the_heads_and_back(rows, of_rows, heads, length, channels, back, dtype):
    mixed = draw(rows, length, (heads + 2) * channels, dtype=dtype)
    x = mixed.view(rows, length, heads + 2, channels).transpose(1, 2)[:, :heads]
    assert_equal("rotate", x, *angles(of_rows, length, channels, dtype), back)


@dtypes
@pytest.mark.parametrize("rows, columns", [(1, 1), (3, 37), (64, 130)])
def test_residual_and_norm_and_their_gradient(rows, columns, dtype):
    x, update, weight = (
        draw(*shape, dtype=dtype, seed=len(shape)) for shape in ((rows, columns), (1, columns), (columns,))
    )
    update = update.expand(rows, -1) + 1
    assert_equal("add_norm", x, update, weight, 1e-5)
    total, _, scale = kernels.add_norm(x, update, weight, 1e-5)
    assert_equal("add_norm_backward", update, x, total, scale, weight)


def test_the_references_gradients_are_those_of_autograd():
    x, update, weight = draw(5, 24), draw(5, 24, seed=1), draw(24, seed=2)
    gate_value, gradient = draw(5, 24, seed=3), draw(5, 12, seed=4)
    for leaf in (x, update, gate_value):
        leaf.requires_grad_()
    total, normed, scale = kernels.add_norm(x, update, weight, 1e-5)
    wanted = torch.autograd.grad((total, normed), (x, update), (draw(5, 24, seed=5), draw(5, 24, seed=6)))
    with torch.no_grad():
        given = kernels.add_norm_backward(draw(5, 24, seed=5), draw(5, 24, seed=6), total, scale, weight)
        turned = kernels.swiglu_backward(gradient, gate_value)
    assert all(relative_difference(given, each) < 1e-6 for each in wanted)
    plain = torch.nn.functional.silu(gate_value[:, :12]) * gate_value[:, 12:]
    assert relative_difference(turned, *torch.autograd.grad(plain, gate_value, gradient)) < 1e-6


def cache(rows, groups, slots, channels, dtype):
    store = draw(2, rows, groups, slots, channels, dtype=dtype, seed=3)
    return store[0], store[1]


@dtypes
@pytest.mark.parametrize("rows, groups, repeats, channels", [(1, 1, 1, 4), (3, 2, 3, 12), (5, 2, 4, 32)])
def test_a_step_writes_its_keys_and_values_into_each_rows_slot(rows, groups, repeats, channels, dtype):
    mixed = draw(rows, (groups * repeats + 2 * groups) * channels, dtype=dtype)
    slots = torch.arange(rows, device=DEVICE) * 2 % 7
    places = [cache(rows + 1, groups, 8, channels, dtype) for _ in range(2)]
    query, expected = (
        module.rotate_into_cache(mixed, *angles(rows, 1, channels, dtype), *both, slots)
        for module, both in zip((kernels_triton, kernels), places, strict=True)
    )
    assert relative_difference(query.cpu(), expected.cpu()) < TOLERANCE[dtype]
    for ours, theirs in zip(*places, strict=True):
        assert relative_difference(ours.cpu(), theirs.cpu()) < TOLERANCE[dtype]


@dtypes
@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("rows, groups, repeats, channels", [(1, 1, 1, 16), (5, 2, 3, 12), (3, 1, 16, 32)])
def test_a_step_attends_to_the_keys_of_each_row_alone(rows, groups, repeats, channels, splits, dtype):
    slots = torch.tensor([199, 0, 64, 130, 7], device=DEVICE)[:rows]
    query = draw(rows, groups * repeats, channels, dtype=dtype)
    assert_equal("attend_step", query, *cache(rows, groups, 201, channels, dtype), slots, splits)


def test_a_row_that_is_not_in_use_sees_one_key(monkeypatch):
    keys, values = cache(2, 1, 71, 16, torch.float32)
    values[:, :, 1:] = torch.nan  # which would be seen in the result
    context = kernels_triton.attend_step(draw(2, 2, 16), keys, values, torch.tensor([70, 0], device=DEVICE), 2)
    assert relative_difference(context.view(2, 2, 16).cpu(), values[:, :, 0].expand(2, 2, 16).cpu()) < 1e-6


# ---- the model


@pytest.fixture
def fused(monkeypatch):
    """The model computes with the kernels, in the interpreter; the set of names that ran."""
    ran = set()

    def noted(name, kernel):
        return lambda *arguments, **options: ran.add(name) or kernel(*arguments, **options)

    taken = Kernels(**{name: noted(name, kernel) for name, kernel in TRITON._asdict().items()})
    for module in ("modeling_chatglm", "attention", "norms"):
        monkeypatch.setattr(f"chatglm2.{module}.kernels_for", lambda x: taken)
    monkeypatch.setattr("chatglm2.attention.num_splits", lambda pairs, width, device: 2)
    return ran


def training_loss(model):
    input_ids = torch.arange(3, 25).view(2, 11) * 7 % 300
    model.zero_grad()
    loss = model.train()(input_ids=input_ids, labels=input_ids).loss
    loss.backward()
    return loss.item(), model.transformer.prefix_encoder.embedding.weight.grad.clone()


def test_a_training_step_has_the_loss_and_gradient_of_plain_torch(request):
    model = synthetic_model()
    loss, gradient = training_loss(model)
    ran = request.getfixturevalue("fused")
    assert training_loss(model)[0] == pytest.approx(loss, rel=1e-6)
    assert relative_difference(training_loss(model)[1], gradient) < 1e-5
    assert ran == {"swiglu", "swiglu_backward", "rotate", "add_norm", "add_norm_backward"}


def test_a_norm_that_is_offloaded_or_trains_is_not_fused(fused):
    block, x = synthetic_model().transformer.encoder.layers[0], torch.ones(1, 64)
    block.requires_grad_(False)
    assert block.fuses(x, x) and not block.fuses(x, x.half())
    block.post_attention_layernorm.requires_grad_(True)
    assert not block.fuses(x, x)
    block.post_attention_layernorm.requires_grad_(False).to("meta")
    assert not block.fuses(x, x)


def test_answers_are_those_of_plain_torch(request):
    model = synthetic_model()
    model.config.eos_token_id = -1
    prompts, settings = [[5, 6, 7], [8]], {"num_known": 315, "batch_size": 2, "rows": range(2)}
    answers = answer_prompts(model, prompts, 6, **settings)
    ran = request.getfixturevalue("fused")
    assert answer_prompts(model, prompts, 6, **settings) == answers
    assert {"rotate_into_cache", "attend_step", "add_norm", "swiglu"} <= ran


# ---- the choice


def try_kernels(monkeypatch, slow=(), broken=()):
    """What is chosen where the kernels named so take longer than torch, or do not work."""

    def one_more(x):
        return x + 1

    def fails(x):
        raise RuntimeError("PassManager::run failed")

    def lasts(x):
        return x + 1

    monkeypatch.setattr(kernels, "seconds", lambda function, arguments: 2.0 if function is lasts else 1.0)
    monkeypatch.setattr(kernels, "trials", lambda *_: dict.fromkeys(Kernels._fields, ((torch.ones(2),), one_more)))
    for name in Kernels._fields:
        kernel = fails if name in broken else lasts if name in slow else one_more
        monkeypatch.setattr(kernels_triton, name, kernel)
    return kernels.chosen.__wrapped__(torch.device("cpu"), torch.float32)


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_a_machine_tries_its_kernels_once_and_again_where_one_did_not_work(monkeypatch):
    with pytest.warns(UserWarning, match="swiglu"):
        assert try_kernels(monkeypatch, broken={"swiglu"}).swiglu is None
    assert try_kernels(monkeypatch, slow={"rotate"}).swiglu
    assert try_kernels(monkeypatch, broken=Kernels._fields).swiglu and not try_kernels(monkeypatch).rotate


def test_a_changed_kernel_is_tried_again(monkeypatch):
    try_kernels(monkeypatch, slow={"rotate"})
    monkeypatch.setattr(kernels, "file_sha256", lambda file: "another")
    assert try_kernels(monkeypatch).rotate


def test_a_kernel_that_takes_longer_than_torch_is_left_out(monkeypatch):
    chosen = try_kernels(monkeypatch, slow={"rotate"})
    assert chosen.rotate is None and None not in chosen._replace(rotate=0)


def test_one_that_does_not_work_is_left_out_and_said(monkeypatch):
    with pytest.warns(UserWarning, match="Left to torch.*swiglu: RuntimeError: PassManager"):
        chosen = try_kernels(monkeypatch, broken={"swiglu"})
    assert chosen.swiglu is None and chosen.add_norm


def test_a_step_takes_both_of_its_kernels_or_none(monkeypatch):
    chosen = try_kernels(monkeypatch, slow={"attend_step"})
    assert chosen.attend_step is chosen.rotate_into_cache is None


def test_wrong_results_are_no_kernel():
    with pytest.raises(RuntimeError, match="off by 10%"):
        kernels.check(torch.ones(3) * 1.1, torch.ones(3))
    with pytest.raises(RuntimeError):
        kernels.check(torch.full((3,), torch.nan), torch.ones(3))


def test_without_a_gpu_there_are_none():
    assert kernels.kernels_for(torch.ones(1)) is kernels.NONE


# ---- machine code


@pytest.mark.slow
@pytest.mark.parametrize(
    "capability, dtype", [(75, "fp16"), (80, "bf16"), (86, "fp32"), (89, "bf16"), (90, "bf16"), (90, "fp16")]
)
def test_the_kernels_compile_without_spills_for_gpus_that_are_not_here(capability, dtype, tmp_path):
    for kernel in machine_code("kernels_triton", dtype, capability, tmp_path):
        assert kernel["stack"] == 0 and kernel["shared"] <= SHARED_MEMORY[capability], kernel
        if "attend" in kernel["name"] and capability >= 80 and dtype != "fp32":
            assert kernel["tensor cores"], kernel
