"""Functions that state their own gradient, and when torch's own operations take their place.

No official file answers to this one: there autograd records every operation.
"""

import torch


def is_transformed():
    """True while torch.func or torch.export run the model: they want operations that they know themselves.

    A transform of torch.func may ask for the gradient of a gradient, for tangents, or for one gradient a row. A program
    that is exported holds for other lengths, so no number may decide what is recorded.
    """
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting()
    return torch._C._are_functorch_transforms_active()  # torch's autograd.Function.apply asks this, too


class OwnGradient(torch.autograd.Function):
    """A function that states its own gradient; `by_torch` is the same in operations that torch knows.

    Where no gradient is wanted its forward runs alone: to record it takes longer than many an operation of a decoding
    step.
    """

    @classmethod
    def apply(cls, *arguments):
        if is_transformed():
            return cls.by_torch(*arguments)
        return super().apply(*arguments) if torch.is_grad_enabled() else cls.forward(NoGradient(), *arguments)


class NoGradient:
    """Stands for the context of forward() where no gradient is wanted: it keeps no tensors."""

    needs_input_grad = (False,) * 3

    def save_for_backward(self, *tensors):
        pass
