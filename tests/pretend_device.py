"""A device made of Python, so that every machine can see whether tensors are where they should be.

Values live on the CPU, and are exact, but torch sees a device of its own: an operation that mixes it with tensors of the CPU
raises, as on a GPU, numpy cannot read it, and it has its own stream of random numbers. As on a GPU, scalars without dimensions
may mix, and indices may stay on the CPU.
"""

import functools

import torch
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretend"
STREAM = torch.Generator().manual_seed(0)


class _Backend:
    """What torch asks of a module such as ``torch.cuda``."""

    used = False

    def is_initialized(self):
        return self.used

    def is_available(self):
        return True

    def _is_in_bad_fork(self):
        return False

    def current_device(self):
        return 0

    def device_count(self):
        return 1

    def manual_seed_all(self, seed):
        STREAM.manual_seed(seed)

    manual_seed = manual_seed_all

    def get_rng_state(self, device=0):
        return STREAM.get_state()

    def set_rng_state(self, state, device=0):
        STREAM.set_state(state)


BACKEND = _Backend()
_setup_privateuseone_for_python_backend(NAME, backend_module=BACKEND)


class OnDevice(torch.Tensor):
    """A tensor of the device, around its values."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, values):
        return torch.Tensor._make_wrapper_subclass(
            cls, values.size(), strides=values.stride(), storage_offset=values.storage_offset(), dtype=values.dtype,
            device=torch.device(NAME, 0),
        )  # fmt: skip

    def __init__(self, values):
        self.values = values
        BACKEND.used = True

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        return _run(op, args, kwargs or {})

    def __repr__(self):
        return f"OnDevice({self.values})"

    def tolist(self):
        return self.values.tolist()

    def numpy(self, *args, **kwargs):
        raise TypeError(f"can't convert {NAME}:0 device type tensor to numpy.")

    __array__ = numpy

    def __deepcopy__(self, memo):
        memo[id(self)] = _placed(self.values.clone(), isinstance(self, torch.nn.Parameter), self.requires_grad)
        return memo[id(self)]

    def __reduce_ex__(self, protocol):
        return _saved_elsewhere, (self.values, isinstance(self, torch.nn.Parameter), self.requires_grad)

    def __tensor_flatten__(self):
        return ["values"], None

    @staticmethod
    def __tensor_unflatten__(inner, meta, size, stride):
        return OnDevice(inner["values"])


def _placed(values, is_parameter, requires_grad):
    tensor = OnDevice(values)
    return torch.nn.Parameter(tensor, requires_grad) if is_parameter else tensor.requires_grad_(requires_grad)


def _saved_elsewhere(values, is_parameter, requires_grad):
    """A file opened with ``map_location="cpu"``."""
    return torch.nn.Parameter(values, requires_grad) if is_parameter else values.requires_grad_(requires_grad)


torch.serialization.add_safe_globals([_saved_elsewhere])


def _run(op, args, kwargs):
    """The operation on the values; what it makes is on the device, and what it changes in place stays the same tensor."""
    here, elsewhere = [], []
    _sort((args, tuple(kwargs.values())), here, elsewhere)
    _refuse_mixtures(op, args, here, elsewhere, kwargs)
    plain_args, plain_kwargs = _changed(_values, args), {k: _changed(_values, v) for k, v in kwargs.items()}
    wanted = kwargs.get("device")
    if wanted is not None:
        plain_kwargs["device"] = torch.device("cpu")
    found = _drawn_from_stream(op, plain_args, plain_kwargs)
    for tensor in here:
        if tensor.shape != tensor.values.shape:
            _follow_shape(tensor)
    if wanted is not None and torch.device(wanted).type == "cpu":
        return found
    if op._schema.name == "aten::copy_":
        return args[0]
    known = {id(t.values): t for t in here}
    return _changed(lambda t: known[id(t)] if id(t) in known else OnDevice(t), found)


def _sort(found, here, elsewhere):
    """Tensors of the device, and those of the CPU that have dimensions."""
    for leaf in found:
        if isinstance(leaf, OnDevice):
            here.append(leaf)
        elif isinstance(leaf, torch.Tensor):
            elsewhere += [leaf] if leaf.dim() else []
        elif isinstance(leaf, list | tuple):
            _sort(leaf, here, elsewhere)


def _changed(change, found):
    if isinstance(found, torch.Tensor):
        return change(found)
    return type(found)(_changed(change, v) for v in found) if isinstance(found, list | tuple) else found


def _values(tensor):
    return tensor.values if isinstance(tensor, OnDevice) else tensor


def _refuse_mixtures(op, args, here, elsewhere, kwargs):
    name = op._schema.name
    if name in ("aten::index", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_"):
        on_cpu = not isinstance(args[0], OnDevice)
        elsewhere = [t for t in (args[0], *args[2:3]) if any(t is e for e in elsewhere)]
        elsewhere = [args[0]] if on_cpu and here else elsewhere
    if here and elsewhere and name not in ("aten::copy_", "aten::_to_copy"):
        raise RuntimeError(f"{name}: expected all tensors to be on the same device, found {NAME}:0 and cpu.")
    if isinstance(kwargs.get("generator"), torch.Generator):
        raise RuntimeError(f"{name}: expected a generator of {NAME}, found one of the CPU.")


@torch.no_grad()
def _drawn_from_stream(op, args, kwargs):
    if torch.Tag.nondeterministic_seeded not in op.tags:
        return op(*args, **kwargs)
    before = torch.get_rng_state()
    torch.set_rng_state(STREAM.get_state())
    try:
        return op(*args, **kwargs)
    finally:
        STREAM.set_state(torch.get_rng_state())
        torch.set_rng_state(before)


@torch.no_grad()
def _follow_shape(tensor):
    """After ``squeeze_`` and its like."""
    with torch._C._DisableTorchDispatch():
        torch.ops.aten.as_strided_(tensor, tensor.values.shape, tensor.values.stride())


def _made(op, *args, **kwargs):
    """A factory: no tensor of the device is among its arguments."""
    return _run(op, args, {**kwargs, "device": kwargs.get("device") or torch.device(NAME)})


def _copy_from(source, target, non_blocking=False):
    with torch.no_grad():
        _values(target).copy_(_values(source))
    return target


_ANY, _ATEN = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
_ANY.fallback(_made, "PrivateUse1")
_ATEN.impl("_copy_from", _copy_from, "PrivateUse1")
_RESIZING = (
    "arange",
    "arange.start",
    "arange.start_step",
    "linspace",
    "eye",
    "eye.m",
    "randperm",
    "randperm.generator",
)
for _name in _RESIZING:  # torch would make an empty tensor and resize it
    _packet, _, _overload = _name.partition(".")
    _op = getattr(getattr(torch.ops.aten, _packet), _overload or "default")
    _ATEN.impl(_name, functools.partial(_made, _op), "PrivateUse1")
