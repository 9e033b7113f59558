"""PyTorch's batch-norm layers as ours, and back: the entries of a `state_dict` by their names.

    PyTorch                        here
    <layer>.weight                 scale
    <layer>.bias                   bias
    <layer>.running_mean           mean
    <layer>.running_var            var
    <layer>.num_batches_tracked    num_batches_tracked, if momentum=None
    momentum (weight of the new)   1 - momentum (weight of the old)
    eps                            epsilon
    always n/(n - 1)               unbiased=True

A whole model, with jax_bn's layers or with Flax's own::

    names = {"layer1.0.bn1": "ResNetBlock_0/BatchNorm_0", ...}       # in PyTorch: in Flax
    variables = model_from_torch(variables, torch_model.state_dict(), names)            # Linen
    state = nnx.to_pure_dict(nnx.state(model))                                          # NNX
    nnx.update(model, model_from_torch(state, torch_model.state_dict(), names))

Needs neither PyTorch nor Flax: tensors are read through NumPy, a model is a nested dict of arrays.
All values are copied, bit for bit. This is no computation: nothing is differentiable or runs under
`jit`, sharded arrays are gathered, and new ones lie on JAX's default device (`jax.device_put`).

Source: the tables of `torch.nn.BatchNorm2d` and of its `state_dict` in PyTorch's documentation.
"""

from jax_bn.torch._layer import (
    fields_from_torch as fields_from_torch,
    from_torch as from_torch,
    to_torch as to_torch,
)
from jax_bn.torch._model import (
    model_from_torch as model_from_torch,
    model_to_torch as model_to_torch,
)
