"""Three walks through the package under ``sys.setprofile``: who calls whom, and who calls upwards.

Run by ``house.py``, one walk a process. Named functions of the package are counted; lambdas, comprehensions and the code of
other libraries are passed over, so an arrow leads from a function to the next one of ours that runs below it.

A call upwards leads from a room to a later one of the list in ``tests/test_layers.py``. It is a *hook* where the method
fills in one of a base class or protocol of the caller's room or an earlier one; a *library hook* where it fills in one of a
class of torch, Pyro or zuko, such as ``forward``, or is a generator that is iterated; and otherwise a *climb*.
"""

import ast
import inspect
import json
import pathlib
import sys

import pyro
import pyro.distributions as dist
import torch

import pyro_dgm as dgm

PACKAGE = pathlib.Path(dgm.__file__).parent
ROOT = f"{PACKAGE}/"


def rooms():
    """The order of rooms, read from the tree that is measured."""
    tree = ast.parse((PACKAGE.parent / "tests" / "test_layers.py").read_text())
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "ROOMS":
            return ast.literal_eval(node.value)
    return []


ORDER = rooms()


def level(file):
    room = file.split("/")[0]
    return ORDER.index(room) if room in ORDER else -1


def file_of(cls):
    """Where a class is defined: a file of the package, or None."""
    source = getattr(sys.modules.get(cls.__module__), "__file__", None) or ""
    return source[len(ROOT) :] if source.startswith(ROOT) else None


def protocols():
    for name, module in list(sys.modules.items()):
        if name.startswith("pyro_dgm"):
            for cls in vars(module).values():
                if isinstance(cls, type) and getattr(cls, "_is_protocol", False) and cls.__module__ == name:
                    yield cls


def full_name(code):
    return getattr(code, "co_qualname", code.co_name)  # Python >= 3.11


def kind_of_climb(caller, callee, code, frame):
    """Whether a call upwards fills in a method that the caller's room, or a library, knows of."""
    method = code.co_name
    first = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
    owner = first if isinstance(first, type) else type(first)
    if code.co_flags & inspect.CO_GENERATOR:
        return "library hooks"
    if not hasattr(owner, method):
        return "climbs"
    others = [cls for cls in owner.__mro__ if method in vars(cls) and file_of(cls) != callee]
    if any(file_of(cls) and level(file_of(cls)) <= level(caller) for cls in others):
        return "hooks"
    for protocol in protocols():
        names = [n for n in vars(protocol) if not n.startswith("_")]
        if method in names and level(file_of(protocol)) <= level(caller) and all(hasattr(owner, n) for n in names):
            return "hooks"
    return "library hooks" if any(file_of(cls) is None for cls in others) else "climbs"


class Trail:
    """What was called while it was open."""

    def __init__(self):
        self.stack, self.functions, self.arrows, self.upwards = [], set(), set(), {}
        self.calls = self.depth = 0

    def __enter__(self):
        sys.setprofile(self._profile)
        return self

    def __exit__(self, *_):
        sys.setprofile(None)

    def _profile(self, frame, event, _):
        code = frame.f_code
        if event not in ("call", "return") or not code.co_filename.startswith(ROOT) or code.co_name.startswith("<"):
            return
        if event == "return":
            if self.stack and self.stack[-1][2] is frame:
                self.stack.pop()
            return
        file = code.co_filename[len(ROOT) :]
        self.calls += 1
        self.functions.add(code)
        if self.stack:
            self._arrow(self.stack[-1], file, code, frame)
        self.stack.append((file, code, frame))
        self.depth = max(self.depth, len(self.stack))

    def _arrow(self, caller, file, code, frame):
        if caller[0] != file:
            self.arrows.add((caller[0], file))
        key = f"{caller[0]}:{full_name(caller[1])} -> {file}:{full_name(code)}"
        if level(caller[0]) < level(file) and key not in self.upwards:
            self.upwards[key] = kind_of_climb(caller[0], file, code, frame)

    def files(self):
        return {code.co_filename for code in self.functions}

    def report(self):
        room = lambda file: file.split("/")[0]
        of = lambda kind: sorted(key for key, value in self.upwards.items() if value == kind)
        return {
            "functions": len(self.functions),
            "files": len(self.files()),
            "rooms": len({room(file[len(ROOT) :]) for file in self.files()}),
            "file arrows": len(self.arrows),
            "room pairs": len({(room(a), room(b)) for a, b in self.arrows if room(a) != room(b)}),
            "climbs": of("climbs"),
            "hooks": len(of("hooks")),
            "library hooks": len(of("library hooks")),
        }


def cost(f):
    """Calls of the package that one call of f makes, when it was made before."""
    f()
    with Trail() as trail:
        f()
    return {"calls": trail.calls, "depth": trail.depth, "files": len(trail.files())}


def schools(error, effect=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(error)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("effect", dist.Normal(theta, error), obs=effect)


def posterior():
    """A flow for the posterior of a hierarchical model, to the verdict on it."""
    error = torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18])
    effect = torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12])
    with Trail() as trail:
        guide = dgm.AutoFlow(schools)
        dgm.fit(dgm.STL_ELBO()(schools, guide), (error, effect), max_steps=10, progress=False, seed=0)
        dgm.khat(dgm.from_svi(schools, guide, error, effect, seed=0))

    def density():
        q = guide.get_posterior(error, effect)
        q.log_prob(q.rsample())

    return trail, {"AutoFlow: get_posterior, rsample, log_prob": cost(density)}


def normals(y=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    with pyro.plate("row", 8):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def amortised():
    """A simulator, a posterior for any of its data, and the correction of one."""
    y = torch.linspace(-1.0, 2.0, 8)
    with Trail() as trail:
        simulations = dgm.simulate(normals, 300, observed="y", seed=0, progress=False)
        guide = dgm.AmortizedGuide(normals, observed=["y"])
        dgm.fit(dgm.ForwardKL(guide), simulations, max_steps=30, progress=False, seed=0)
        conditioned = guide.condition(y=y)
        draws = conditioned.sample((100,))
        conditioned.log_prob(draws)
        conditioned.refine(200, seed=0)
    sampling = cost(lambda: conditioned.sample((100,)))
    return trail, {"conditioned: sample": sampling, "conditioned: log_prob": cost(lambda: conditioned.log_prob(draws))}


def likelihood():
    """A continuous flow by maximum likelihood."""
    x = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
    with Trail() as trail:
        dgm.fit(dgm.MaximumLikelihood(dgm.FFJORD(2)), (x,), max_steps=25, progress=False, seed=0)
    flow = dgm.FFJORD(2)
    return trail, {"FFJORD: log_prob": cost(lambda: flow().log_prob(x))}


if __name__ == "__main__":
    trail, densities = {f.__name__: f for f in (posterior, amortised, likelihood)}[sys.argv[1]]()
    print(json.dumps({**trail.report(), "one density": densities}))
