"""Inputs of the wrong kind for every public callable: is each converted, refused by an error of ours, or a fault?

``python -m tests.benchmarks fuzz --count 10000 --seeds 0 1 2`` mutates the calls of ``_fuzz_calls.py`` and ``_fuzz_plates.py``, one number a case;
``--only NAME`` takes some of them, ``--case 417 --seeds 0`` repeats one and shows its error. An outcome is

- right: a finite result of the module's dtype, or one of which a warning told;
- refused: by a ``raise`` of this package, in one line below 600 characters;
- theirs: an error that the user's own program raised;
- a fault: anything else.
"""

import contextlib
import copy
import dataclasses
import dis
import io
import logging
import os
import pathlib
import random
import signal
import tempfile
import time
import traceback
import warnings
from collections import Counter, defaultdict

import numpy as np
import pyro
import torch
from torch import nn

import pyro_dgm
from tests.benchmarks import _fuzz_calls as calls
from tests.benchmarks import _fuzz_plates as of_plates

COUNT = 10_000
CPU_SECONDS = 6.0  # of one call: a hang
WALL_SECONDS = 90.0
LONGEST = 600  # characters of a message
HERE = str(pathlib.Path(pyro_dgm.__file__).parent)
USERS = (calls.__file__, of_plates.__file__)  # the programs in them are a user's


class TooLong(BaseException):
    """A call that goes on and on."""


# --- mutations: (random, value) -> value -------------------------------------------------------------------------------


def _entry(number):
    def put(rng, x):
        x = x.clone() if x.is_floating_point() else x.float()
        if x.numel():
            x.reshape(-1)[rng.randrange(x.numel())] = number
        return x

    return put


def _frame(rng, x):
    import pandas as pd

    return pd.DataFrame(x.numpy()) if x.dim() == 2 else pd.Series(x.reshape(-1).numpy())


def _labelled(rng, x):
    return _frame(rng, x).astype(object).map(str) if x.dim() == 2 else _frame(rng, x).astype(str)


def _gap(rng, x):
    frame = _frame(rng, x).astype(float)
    if frame.size:
        frame.iloc[0] = None
    return frame


def _strided(rng, x):
    return torch.stack([x, x], -1)[..., 0]


OF_TENSORS = {
    "float64": lambda rng, x: x.double(),
    "float16": lambda rng, x: x.half(),
    "bfloat16": lambda rng, x: x.bfloat16(),
    "int64": lambda rng, x: x.long(),
    "int8": lambda rng, x: x.to(torch.int8),
    "bool": lambda rng, x: x > 0,
    "complex": lambda rng, x: x.to(torch.complex64),
    "sparse": lambda rng, x: x.to_sparse(),
    "meta": lambda rng, x: x.to("meta"),
    "quantized": lambda rng, x: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8) if x.dim() else x,
    "nested": lambda rng, x: torch.nested.nested_tensor(list(x.float())) if x.dim() > 1 and len(x) else x,
    "uint8": lambda rng, x: x.float().abs().to(torch.uint8),
    "int32": lambda rng, x: x.int(),
    "requires_grad": lambda rng, x: x.clone().float().requires_grad_(),
    "inside a graph": lambda rng, x: x.clone().float().requires_grad_() * 1.0,
    "non-contiguous": _strided,
    "expanded": lambda rng, x: x[:1].expand_as(x) if x.dim() else x,
    "numpy": lambda rng, x: x.numpy(),
    "numpy float64": lambda rng, x: x.numpy().astype(float),
    "numpy float16": lambda rng, x: x.numpy().astype(np.float16),
    "numpy longdouble": lambda rng, x: x.numpy().astype(np.longdouble),
    "numpy uint8": lambda rng, x: np.abs(x.numpy()).astype(np.uint8),
    "numpy dates": lambda rng, x: x.numpy().astype(int).astype("datetime64[D]"),
    "numpy records": lambda rng, x: np.rec.fromarrays([x.numpy()], names="a"),
    "big-endian numpy": lambda rng, x: x.numpy().astype(">f4"),
    "negative strides": lambda rng, x: x.numpy()[::-1] if x.dim() else x.numpy(),
    "numpy int": lambda rng, x: x.numpy().astype(int),
    "numpy bool": lambda rng, x: x.numpy() > 0,
    "numpy object": lambda rng, x: x.numpy().astype(object),
    "numpy complex": lambda rng, x: x.numpy().astype(complex),
    "numpy text": lambda rng, x: x.numpy().astype(str),
    "numpy masked": lambda rng, x: np.ma.masked_array(x.numpy(), mask=False),
    "read-only numpy": lambda rng, x: np.broadcast_to(x.numpy(), x.shape),
    "pandas": _frame,
    "pandas with a text": _labelled,
    "pandas with a gap": _gap,
    "pandas nullable": lambda rng, x: _frame(rng, x).astype("Float64"),
    "list": lambda rng, x: x.tolist(),
    "tuple": lambda rng, x: tuple(x.tolist()) if x.dim() else x,
    "ragged list": lambda rng, x: [*x.tolist(), [1.0]] if x.dim() else [[1.0], [1.0, 2.0]],
    "list of numpy": lambda rng, x: list(x.numpy()) if x.dim() else [x.numpy()],
    "iterator": lambda rng, x: iter(x.tolist()) if x.dim() else x,
    "in a dictionary": lambda rng, x: {"x": x},
    "in a tuple": lambda rng, x: (x,),
    "as a function": lambda rng, x: lambda: x,
    "as a parameter": lambda rng, x: nn.Parameter(x.clone().float()),
    "list of tensors": lambda rng, x: list(x) if x.dim() else [x],
    "NaN": _entry(float("nan")),
    "inf": _entry(float("inf")),
    "-inf": _entry(-float("inf")),
    "huge": _entry(1e30),
    "largest": _entry(3e38),
    "tiny": _entry(1e-38),
    "negative": _entry(-3.0),
    "fraction": _entry(0.5),
    "all NaN": lambda rng, x: torch.full(x.shape, torch.nan),
    "all huge": lambda rng, x: x.float() * 1e30,
    "all tiny": lambda rng, x: x.float() * 1e-30,
    "large units": lambda rng, x: x.float() * 1e4 + 1e5,
    "constant": lambda rng, x: torch.ones_like(x),
    "no rows": lambda rng, x: x[:0] if x.dim() else x,
    "one row": lambda rng, x: x[:1] if x.dim() else x,
    "two rows": lambda rng, x: x[:2] if x.dim() else x,
    "one row less": lambda rng, x: x[:-1] if x.dim() else x,
    "no columns": lambda rng, x: x[..., :0] if x.dim() else x,
    "one column less": lambda rng, x: x[..., :-1] if x.dim() else x,
    "one column more": lambda rng, x: torch.cat([x, x[..., :1]], -1) if x.dim() else x,
    "further dimension": lambda rng, x: x[None],
    "last dimension": lambda rng, x: x[..., None],
    "flat": lambda rng, x: x.reshape(-1),
    "one number": lambda rng, x: x.reshape(-1)[0] if x.numel() else x,
    "transposed": lambda rng, x: x.T if x.dim() == 2 else x,
}
OF_TENSORS = {
    k: (lambda rng, x, f=f: f(rng, x.detach()) if isinstance(x, torch.Tensor) else x) for k, f in OF_TENSORS.items()
}

OTHER_TYPES = {
    "None": None, "text": "abc", "a number": 3, "a fraction": 2.5, "a dictionary": {"a": 1}, "an empty tuple": (),
    "an empty list": [], "a function": len, "a class": dict, "an object": object(), "a set": {1, 2}, "bytes": b"x",
    "True": True, "a module": nn.Linear(2, 2), "Ellipsis": ..., "a distribution": torch.distributions.Normal(0.0, 1.0),
    "a generator": (i for i in range(3)), "a parameter": nn.Parameter(torch.ones(2)), "a path": pathlib.Path("x"),
    "a complex number": 1j, "a range": range(3), "a device": torch.device("cpu"), "a type": float, "a warning": UserWarning("x"),
}  # fmt: skip
NUMBERS = [0, 1, -1, 2, 3, 7, 2.5, -0.5, 0.5, float("nan"), float("inf"), -float("inf"), 1e-30, True, "3", None, [2], (2, 2),
           -(2**70), 2**70, 10**400, np.bool_(True), np.float16(2.0), torch.tensor(2, device="meta"), np.array(2.0), "NaN",
           np.int64(2), np.float32(0.5), torch.tensor(2), torch.tensor([1.0, 2.0]), 1j, b"2"]  # fmt: skip
SHAPES = [
    (),
    (0,),
    (1,),
    (-1,),
    (2, 2),
    (1, 2),
    2,
    2.5,
    "ab",
    None,
    (2.0,),
    [2],
    torch.Size([2]),
    (None,),
    ("a",),
    True,
    (2**40, 2**40),
    (2, -1),
    (np.int64(2),),
    torch.tensor([2]),
    (1j,),
    {"a": 2},
    range(2),
]
TEXTS = [
    "",
    " ",
    "SPHERICAL",
    "é",
    "a" * 80,
    "x.y/z",
    0,
    True,
    ["mu", "mu"],
    {"mu"},
    ("mu", 3),
    "abc",
    "x",
    "mu",
    "row",
    None,
    3,
    ["x"],
    b"x",
    ("x", "x"),
    0.5,
]


def mutate(rng, value):
    """Another value in its place, and what was done."""
    if isinstance(value, torch.Tensor) and rng.random() < 0.93:
        kind = rng.choice(list(OF_TENSORS))
        return OF_TENSORS[kind](rng, value), kind
    if isinstance(value, np.ndarray) and rng.random() < 0.93:
        kind = rng.choice(list(OF_TENSORS))
        return OF_TENSORS[kind](rng, torch.as_tensor(value)), kind
    if isinstance(value, (bool, int, float)) and not rng.random() < 0.1:
        new = rng.choice(NUMBERS)
        return new, f"{new!r} in the place of a number"
    if isinstance(value, str) and rng.random() < 0.9:
        new = rng.choice(TEXTS)
        return new, f"{new!r} in the place of a text"
    if isinstance(value, dict) and value and rng.random() < 0.85:
        return _of_dictionary(rng, value)
    if isinstance(value, (tuple, list)) and value and rng.random() < 0.85:
        return _of_sequence(rng, value)
    if isinstance(value, nn.Module) and rng.random() < 0.3:
        return copy.deepcopy(value).double(), "a module of float64"
    kinds = [k for k in OTHER_TYPES if not (callable(value) and k in ("a function", "a class", "a type", "a module"))]
    kind = rng.choice(kinds)  # what a wrong program of the user does is theirs
    return OTHER_TYPES[kind], kind


def _of_dictionary(rng, value):
    key = rng.choice(list(value))
    how = rng.random()
    if how < 0.15:
        return {k: v for k, v in value.items() if k != key}, f"without {key!r}"
    if how < 0.3:
        return {"other" if k == key else k: v for k, v in value.items()}, f"{key!r} named 'other'"
    if how < 0.35:
        return value | {"other": value[key]}, "with 'other'"
    new, kind = mutate(rng, value[key])
    return value | {key: new}, f"{key}: {kind}"


def _of_sequence(rng, value):
    make = type(value) if type(value) in (tuple, list) else tuple
    how = rng.random()
    index = rng.randrange(len(value))
    if how < 0.15:
        return make(v for i, v in enumerate(value) if i != index), "one entry less"
    if how < 0.3:
        return make([*value, value[index]]), "one entry twice"
    if how < 0.55 and all(isinstance(v, int) for v in value):
        new = rng.choice(SHAPES)
        return new, f"shape {new!r}"
    new, kind = mutate(rng, value[index])
    return make([*value[:index], new, *value[index + 1 :]]), f"an entry: {kind}"


# --- one case ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Case:
    """One input: a call, what was changed, and how it ended."""

    seed: int
    number: int
    name: str
    changed: str
    outcome: str = "right"
    fault: str = ""
    seconds: float = 0.0


def prepared(seed, number, names):
    """The call of a case with its mutated arguments."""
    rng = random.Random(f"{seed}-{number}")
    torch.manual_seed(rng.randrange(2**31))
    np.random.seed(rng.randrange(2**31))
    pyro.clear_param_store()
    name = names[rng.randrange(len(names))]
    call = calls.CALLS[name]()
    arguments = dict(call.arguments)
    changed = []
    for _ in range(1 if rng.random() < 0.85 else 2):
        settings = {k: v for k, v in call.options.items() if k not in arguments}
        untouched = {k: v for k, v in call.arguments.items() if arguments[k] is v}
        pool = settings if settings and rng.random() < min(0.6, 0.1 * len(settings)) else untouched
        if not pool:
            break
        key = rng.choice(list(pool))
        value, kind = _of_option(rng, pool[key]) if pool is settings else mutate(rng, pool[key])
        arguments[key] = value
        changed.append(f"{key}: {kind}")
    return call, arguments, Case(seed, number, name, "; ".join(changed))


def _of_option(rng, value):
    """A default of None may stand for anything."""
    if value is None:
        new = rng.choice([*NUMBERS, *TEXTS, *SHAPES])
        return new, f"{new!r} for the option"
    return mutate(rng, value)


def judged(call, arguments, case):
    """Run it, and write the outcome into the case."""
    before = {k: _kept(v) for k, v in arguments.items()}
    began = time.process_time()
    told = []
    try:
        with limited(), quiet(), warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            result = call.do(**arguments)
            case.fault = _of_result(call, result, told, case)
    except TooLong as error:
        case.fault = f"goes on and on, {_place(list(traceback.walk_tb(error.__traceback__))[:-1])}"
    except Exception as error:
        case.outcome, case.fault = _of_error(error)
    case.seconds = time.process_time() - began
    changed = [k for k, v in arguments.items() if not _same(before[k], v)]
    if changed and not case.fault and not call.changes:
        case.fault = f"changes its input {changed}"
    if case.fault:
        case.outcome = "fault"
    return case


def _kept(value):
    if isinstance(value, torch.Tensor):
        return (value, value.detach().clone(), value.requires_grad)
    if isinstance(value, np.ndarray):
        return (value, copy.deepcopy(value), None)
    if type(value) in (list, tuple):
        return [_kept(v) for v in value]
    if type(value) is dict:
        return {k: _kept(v) for k, v in value.items()}
    return value


def _has_no_plain_numbers(x):
    return x.is_meta or x.is_quantized or x.is_nested or x.layout is not torch.strided


def _same(kept, value):
    if isinstance(value, torch.Tensor):
        if kept[2] != value.requires_grad or (value.is_leaf and value.grad is not None):
            return False
        return _has_no_plain_numbers(value) or torch.equal(kept[1].nan_to_num(), value.detach().nan_to_num())
    if isinstance(value, np.ndarray):
        return np.array_equal(kept[1], value, equal_nan=value.dtype.kind == "f")
    if type(value) in (list, tuple):
        return len(kept) == len(value) and all(map(_same, kept, value))
    if type(value) is dict:
        return kept.keys() == value.keys() and all(_same(kept[k], value[k]) for k in value)
    return kept is value


def _of_result(call, result, told, case):
    numbers = list(tensors_of(result))
    for each in numbers:
        if call.dtype and each.is_floating_point() and each.dtype is not call.dtype and "float64" not in case.changed:
            return f"a result of {each.dtype}"
    of_us = any(issubclass(w.category, UserWarning) for w in told)
    bad = any(bool(each.isnan().any() or (each == torch.inf).any()) for each in numbers if not each.is_meta)
    if bad and not of_us and "nan" not in call.allows:
        return "a silent NaN or infinity"
    return ""


def tensors_of(result):
    """All numbers in a result."""
    if isinstance(result, torch.Tensor):
        if not _has_no_plain_numbers(result):
            yield result.detach()
    elif isinstance(result, (np.ndarray, np.floating, float)) and not isinstance(result, bool):
        if np.asarray(result).dtype.kind == "f":
            yield torch.as_tensor(np.array(result), dtype=torch.float32)  # of Python and numpy: no dtype to keep
    elif isinstance(result, dict):
        for each in result.values():
            yield from tensors_of(each)
    elif isinstance(result, (tuple, list)):
        for each in result:
            yield from tensors_of(each)
    elif dataclasses.is_dataclass(result) and not isinstance(result, type):
        yield from tensors_of({f.name: getattr(result, f.name) for f in dataclasses.fields(result)})


def _of_error(error):
    """Refused, theirs, or a fault with its place."""
    frames = list(traceback.walk_tb(error.__traceback__))
    files = [f.f_code.co_filename for f, _ in frames]
    if not any(f.startswith(HERE) for f in files):
        return "theirs", ""
    ours = max((i for i, f in enumerate(files) if f.startswith(HERE)), default=-1)
    user = max(
        (
            i
            for i, (f, _) in enumerate(frames)
            if f.f_code.co_filename in USERS and f.f_code.co_name.startswith("user_")
        ),
        default=-1,
    )
    text = str(error)
    if user > ours or text.startswith("user_"):
        return "theirs", ""
    last, line = frames[-1]
    where = f"{pathlib.Path(last.f_code.co_filename).name}:{line}"
    place = f"{pathlib.Path(files[ours]).relative_to(HERE)}:{frames[ours][1]}" if ours >= 0 else where
    kind = f"{type(error).__name__} at {place}"
    if not files[-1].startswith(HERE) or not _raises(error) or isinstance(error, AssertionError):
        return "fault", f"{kind}, from {where}: {text[:90]!r}"
    if "\n" in text.strip() or len(text) > LONGEST:
        return "fault", f"{kind}: {len(text)} characters, {text.count(chr(10)) + 1} lines: {text[:60]!r}"
    return "refused", ""


def _place(frames):
    """The last line of this package, and the last of all."""
    files = [(f.f_code.co_filename, line) for f, line in frames]
    ours = [f"{pathlib.Path(f).relative_to(HERE)}:{line}" for f, line in files if f.startswith(HERE)]
    return f"{ours[-1] if ours else ''}, from {pathlib.Path(files[-1][0]).name}:{files[-1][1]}"


def _raises(error):
    """Whether the last frame is at a ``raise``."""
    tb = error.__traceback__
    while tb.tb_next is not None:
        tb = tb.tb_next
    return dis.opname[tb.tb_frame.f_code.co_code[tb.tb_lasti]] == "RAISE_VARARGS"


@contextlib.contextmanager
def limited():
    """Within the context a call that takes too long is stopped."""

    def stop(number, frame):
        raise TooLong

    before = signal.signal(signal.SIGPROF, stop), signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS, 1.0)
    signal.setitimer(signal.ITIMER_REAL, WALL_SECONDS, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGPROF, before[0])
        signal.signal(signal.SIGALRM, before[1])


@contextlib.contextmanager
def quiet():
    """Nothing is printed."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(level)


# --- many --------------------------------------------------------------------------------------------------------------


def run(seed, numbers, names=None):
    """The cases of a seed, judged."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = names or list(calls.CALLS)
    for number in numbers:
        state = torch.get_num_threads()
        case = judged(*prepared(seed, number, names))
        plt.close("all")
        torch.set_num_threads(state)
        yield case


def print_faults(cases):
    """Faults by callable and kind, the most frequent first, with a case to repeat."""
    groups = defaultdict(list)
    for case in cases:
        if case.fault:
            groups[case.name, case.fault].append(case)
    for (name, fault), found in sorted(groups.items(), key=lambda g: (-len(g[1]), g[0])):
        first = found[0]
        print(
            f"{len(found):4d}  {name:32s} {fault}\n      case {first.number} of seed {first.seed}: {first.changed[:150]}"
        )


def main(arguments):
    torch.set_num_threads(1)
    names = [n for n in calls.CALLS if not arguments.only or n in arguments.only or n.split(":")[0] in arguments.only]
    missing = calls.without_recipe()
    print(f"{len(names)} calls; public names without one: {', '.join(missing) or 'none'}; seeds {arguments.seeds}")
    if arguments.case is not None:
        return [repeat(arguments.seeds[0], arguments.case, names)]
    cases = []
    began = time.process_time()
    here = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # some of the settings are names of files
        for seed in arguments.seeds:
            cases += run(seed, range(arguments.count or COUNT), names)
        os.chdir(here)
    print_faults(cases)
    print(", ".join(f"{n} {k}" for k, n in Counter(c.outcome for c in cases).most_common()),
          f"in {time.process_time() - began:.0f} CPU seconds")  # fmt: skip
    slow = Counter()
    for case in cases:
        slow[case.name] += case.seconds
    print("most seconds: " + ", ".join(f"{n} {s:.0f}" for n, s in slow.most_common(8)))
    return [dataclasses.asdict(c) for c in cases]


def repeat(seed, number, names):
    """One case, with its traceback."""
    call, arguments, case = prepared(seed, number, names)
    print(case.name, "|", case.changed)
    do = call.do

    def shown(**k):
        try:
            result = do(**k)
        except Exception:
            said.append(traceback.format_exc())
            raise
        said.append(repr(result)[:500])
        return result

    said = []
    judged(dataclasses.replace(call, do=shown), arguments, case)
    print(*said, case, sep="\n")
    return dataclasses.asdict(case)
