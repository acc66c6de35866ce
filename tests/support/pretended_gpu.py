"""GPUs that are not there: tensors that say they lie on cuda:0 or cuda:1 and are computed on the CPU.

As on a real GPU, a tensor of the CPU or of another GPU among them is refused, and what goes from one to the other is
counted, because a real GPU has to wait for it. For code that chooses by device, in Python. torch's C++ takes them for tensors of the CPU:
what it would decide itself is replaced by plain operations, and kernels, graphs and streams cannot be pretended.
"""

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import CausalBias, CausalVariant
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

from chatglm2 import kernels
from chatglm2.attention import CausalMask

GPU = torch.device("cuda", 0)
aten = torch.ops.aten
# These take a tensor of the other device on a real GPU, too.
MEETING_ALLOWED = {
    aten.copy_.default,
    aten.index.Tensor,
    aten.index_put_.default,
    aten._index_put_impl_.default,
}


# These only take memory, or name it anew; dropout() comes by only in inference mode, where it does nothing.
NO_KERNELS = {
    aten.dropout,
    *(aten.empty, aten.new_empty, aten.empty_like, aten.empty_strided, aten.new_empty_strided),
    *(aten._unsafe_view, aten.detach, aten._local_scalar_dense),
}


class GPUTensor(torch.Tensor):
    """`content`, a tensor of the CPU, as if it lay on a GPU."""

    @staticmethod
    def __new__(cls, content, place=GPU):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            content.shape,
            strides=content.stride(),
            storage_offset=content.storage_offset(),
            dtype=content.dtype,
            requires_grad=content.requires_grad,
        )

    def __init__(self, content, place=GPU):
        self.content, self.place = content, place

    def __repr__(self, **_):
        return f"GPUTensor({self.content})"

    device = property(lambda self: self.place)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    @property
    def data(self):
        return super().data

    @data.setter
    def data(self, other):
        torch.Tensor.data.__set__(self, other)
        self.content, self.place = other.content, other.place

    def data_ptr(self):
        return self.content.data_ptr()

    def storage(self):
        return self.content.storage()

    def untyped_storage(self):
        return self.content.untyped_storage()

    def get_device(self):
        return self.place.index

    def cpu(self):
        transfers.append("from the GPU")
        return self.content.detach().clone()

    def tolist(self):
        return self.cpu().tolist()

    def to(self, *args, copy=False, **kwargs):
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        result = self if dtype is None else super().to(dtype)
        if device is None or with_number(device) == self.place:
            return result
        if device.type == "cpu":
            return result.cpu()
        transfers.append("to another GPU")
        content = result.content.to("meta") if device.type == "meta" else result.content.detach().clone()
        return content if device.type == "meta" else GPUTensor(content, device)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


launches = []  # kernels that a real GPU would run, by name; transfers aside
transfers = []  # what has gone from one device to the other; item() among them


def with_number(device):
    return GPU if device.type == "cuda" and device.index is None else device


def compute(func, args, kwargs):
    """What torch calls for each operation."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    on_gpu = [isinstance(tensor, GPUTensor) for tensor in tensors]
    places = {tensor.place for tensor in tensors if isinstance(tensor, GPUTensor)}
    assert len(places) < 2 or func is aten.copy_.default, f"{func}: arguments lie on {places}"
    place = tensors[0].place if len(places) > 1 else next(iter(places), GPU)
    if func not in MEETING_ALLOWED and any(on_gpu):
        strangers = [tensor for tensor in tensors if not isinstance(tensor, GPUTensor) and tensor.dim() > 0]
        assert not strangers, f"{func}: {strangers[0].shape} lies on the CPU, other arguments on the GPU"
    elif func is not aten.copy_.default and any(on_gpu):  # an index may lie on the CPU, nothing else
        assert on_gpu[0], f"{func}: {tensors[0].shape} lies on the CPU, its index or values on the GPU"
        assert len(args) < 3 or isinstance(args[2], GPUTensor) or args[2].dim() == 0
    result_on_gpu = any(on_gpu)
    if func is aten._local_scalar_dense.default and result_on_gpu:
        transfers.append("from the GPU")
    if func is aten.copy_.default and on_gpu[0] != on_gpu[1]:
        transfers.append("to the GPU" if on_gpu[0] else "from the GPU")
        result_on_gpu = on_gpu[0]
    if kwargs.get("device") is not None:
        if kwargs["device"].type == "cuda":
            if tensors and not result_on_gpu:
                transfers.append("to the GPU")
            result_on_gpu, place = True, with_number(kwargs["device"])
        kwargs = {**kwargs, "device": torch.device("cpu")}
    kwargs = {name: value for name, value in kwargs.items() if name not in ("pin_memory", "non_blocking")}
    contents = tree_map_only(GPUTensor, lambda tensor: tensor.content, (args, kwargs))
    views = any(result.alias_info and not result.alias_info.is_write for result in func._schema.returns)
    if result_on_gpu and not views and func.overloadpacket not in NO_KERNELS:
        launches.append(str(func))
    result = func(*contents[0], **contents[1])
    if not result_on_gpu:
        return result
    with torch.inference_mode(False):  # a view of a weight, for one, is no tensor of inference
        result = tree_map_only(torch.Tensor, lambda content: GPUTensor(content, place), result)
    return return_and_correct_aliasing(func, args, kwargs, result) if any(on_gpu) else result


class PretendedGPU(TorchDispatchMode):
    """While it is entered, cuda:0 and cuda:1 are there. `monkeypatch` replaces what C++ would decide by device."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.current = 0
        for place, name, value in (
            (torch.cuda, "_lazy_init", lambda: None),
            (torch.cuda, "get_device_capability", lambda device=None: (9, 0)),
            (F, "scaled_dot_product_attention", plain_attention),
            (F, "rms_norm", plain_norm),
            (torch.cuda, "current_device", lambda: self.current),
            (torch.cuda, "set_device", lambda device: setattr(self, "current", getattr(device, "index", device))),
        ):
            monkeypatch.setattr(place, name, value)
        monkeypatch.setattr("chatglm2.attention.causal_lower_right", causal_lower_right)
        monkeypatch.setattr("chatglm2.kernels.chosen", lambda device, dtype: kernels.NONE)  # Triton cannot run here
        monkeypatch.setattr(torch.Tensor, "to", to)
        transfers.clear()

    def __enter__(self):
        self.cudnn = torch.backends.cuda.cudnn_sdp_enabled()
        torch.backends.cuda.enable_cudnn_sdp(True)  # as on a real GPU
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(…, device="cuda") comes by here, too
        torch.__future__.set_overwrite_module_params_on_conversion(True)  # Module.to: a new parameter, of another class
        return super().__enter__()

    def __exit__(self, *error):
        torch.backends.cuda.enable_cudnn_sdp(self.cudnn)
        torch._C._set_only_lift_cpu_tensors(False)
        torch.__future__.set_overwrite_module_params_on_conversion(False)
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


class ThreadOnGPUs(TorchDispatchMode):
    """For another thread than the one that has entered PretendedGPU."""

    def __enter__(self):
        torch._C._set_only_lift_cpu_tensors(True)  # each thread has its own
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


def halves(num_layers, second):
    """The first half of the layers on one GPU, the rest of the model on another device."""
    first = [f"encoder.layers.{layer}" for layer in range(num_layers // 2)]
    rest = [f"encoder.layers.{layer}" for layer in range(num_layers // 2, num_layers)]
    places = dict.fromkeys(["embedding", *first, "prefix_encoder"], GPU)
    places |= dict.fromkeys([*rest, "encoder.final_layernorm", "output_layer"], torch.device(second))
    return {f"transformer.{name}": place for name, place in places.items()}


plain_to = torch.Tensor.to


def to(tensor, *args, **kwargs):
    """Tensor.to, where "cuda" without a number would ask the driver for it."""
    args = [GPU if str(value) == "cuda" else value for value in args]
    return plain_to(tensor, *args, **kwargs)


def causal_lower_right(queries, keys):
    with _disable_current_modes():  # it is a tensor itself, of the CPU
        return CausalMask(CausalVariant.LOWER_RIGHT, queries, keys)


def plain_attention(query, key, value, mask=None, dropout=0.0, *, enable_gqa=False):
    assert query.device == key.device == value.device and query.dtype == key.dtype == value.dtype
    if query.is_cuda:
        assert not torch.backends.cuda.cudnn_sdp_enabled(), "torch would take cuDNN's attention"
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    if isinstance(mask, CausalBias):
        queries, keys = scores.shape[-2:]
        hidden = torch.ones(queries, keys, dtype=torch.bool, device=query.device).triu(1 + keys - queries)
        scores = scores.masked_fill(hidden, -torch.inf)
    elif mask is not None:
        scores = scores + mask
    return scores.softmax(-1) @ value


def plain_norm(x, shape, weight, eps):
    assert x.dtype == weight.dtype and x.device == weight.device
    wide = x.float()
    return (wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt() * weight).to(x.dtype)


# ---- counting kernels


class Launch(torch.autograd.Function):
    """function(*tensors) as so many kernels forward and backward, whatever operations it is made of."""

    @staticmethod
    def forward(ctx, function, forward, backward, *tensors):
        ctx.function, ctx.backward_launches = function, backward
        ctx.save_for_backward(*tensors)
        launches.extend([f"{function.__name__}"] * forward)
        return GPUTensor(function(*(tensor.content.detach() for tensor in tensors)), tensors[0].place)

    @staticmethod
    def backward(ctx, gradient):
        tensors = [tensor.content.detach().requires_grad_() for tensor in ctx.saved_tensors]
        with torch.enable_grad():
            result = ctx.function(*tensors)
        launches.extend([f"{ctx.function.__name__} backward"] * ctx.backward_launches)
        gradients = torch.autograd.grad(result, tensors, gradient.content)
        return None, None, None, *map(GPUTensor, gradients)


def as_a_gpu_launches(monkeypatch):
    """Count attention and norm as the kernels that torch has for them, and let the model take every fused kernel."""

    def attention(query, key, value, mask=None, dropout=0.0, *, enable_gqa=False):
        if not query.is_cuda:  # inside a fused kernel
            return plain_attention(query, key, value, mask, enable_gqa=enable_gqa)

        def flash_attention(*tensors):
            numbers = mask.content if isinstance(mask, GPUTensor) else mask
            context = plain_attention(*tensors, numbers, enable_gqa=enable_gqa)
            return context.transpose(1, 2).contiguous().transpose(1, 2)  # laid out as the real one's

        # Backward: the product of gradient and output, the kernel, its conversion, and sums over the heads of a group.
        return Launch.apply(flash_attention, 1, 5, query, key, value)

    def norm(x, shape, weight, eps):
        def rms_norm(x, weight):
            return plain_norm(x, shape, weight, eps)

        return Launch.apply(rms_norm, 1, 1, x, weight)

    def fused(name):
        def kernel(*arguments, **options):
            launches.extend([name] * (2 if name == "attend_step" else 1))
            places = {x.place for x in arguments if isinstance(x, torch.Tensor)}
            assert len(places) == 1, f"{name}: arguments lie on {places}"
            contents = [x.content if isinstance(x, GPUTensor) else x for x in arguments]
            results = getattr(kernels, name)(*contents, **options)
            return tree_map_only(torch.Tensor, lambda result: GPUTensor(result, *places), results)

        return kernel

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    monkeypatch.setattr(F, "rms_norm", norm)
    taken = kernels.Kernels(**{name: fused(name) for name in kernels.Kernels._fields})
    monkeypatch.setattr(kernels, "chosen", lambda device, dtype: taken)
    monkeypatch.setattr("chatglm2.attention.num_splits", lambda pairs, slots, device: 1)
