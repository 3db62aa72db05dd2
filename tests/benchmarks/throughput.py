"""Rows a second of training, and peak memory, over batch and columns: one thread, steps of ``fit`` on random numbers.

``--only NSF:8:4096`` takes some (family:D:batch). Columns: rows a second, milliseconds a step, MiB that the process gained at its peak, and
for a million rows the hours of 20 epochs, computed.
"""

import resource
import time

import torch

import pyro_dgm as dgm
from pyro_dgm.train.fit import Asked, begun

FAMILIES = {"RealNVP": dgm.RealNVP, "MAF": dgm.MAF, "NSF": dgm.NSF, "FFJORD": dgm.FFJORD}
CASES = [(f, d, b) for f in FAMILIES for d in (8, 43) for b in (256, 4096)]
SECONDS = 6.0


def matching(family, d):
    return dgm.FlowMatching(family(d)) if family is dgm.FFJORD else dgm.MaximumLikelihood(family(d))


def row(name, d, batch):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    x = torch.randn(max(20_000, 4 * batch), d)
    asked = Asked(matching(FAMILIES[name], d), x, batch_size=batch, max_steps=10**6, validation=0.0, progress=False)
    with begun(asked) as (loop, saved):
        loop.begin(saved)
        for _ in range(3):
            loop.advance()
        began, steps = time.process_time(), 0
        while time.process_time() - began < SECONDS:
            loop.advance()
            steps += 1
        seconds = (time.process_time() - began) / steps
    gained = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {"family": name, "D": d, "batch": batch, "rows": batch / seconds, "ms": 1e3 * seconds, "mib": gained,
            "hours": 20e6 / (batch / seconds) / 3600}  # fmt: skip


def main(arguments):
    torch.set_num_threads(1)
    cases = [(f, int(d), int(b)) for f, d, b in (each.split(":") for each in arguments.only or [])] or CASES
    print(f"{'family':>8s}{'D':>4s}{'batch':>7s}{'rows/s':>10s}{'ms':>8s}{'MiB':>7s}{'hours':>7s}")
    rows = []
    for case in cases:
        rows.append(r := row(*case))
        print(
            f"{r['family']:>8s}{r['D']:4d}{r['batch']:7d}{r['rows']:10,.0f}{r['ms']:8.1f}{r['mib']:7.0f}{r['hours']:7.2f}",
            flush=True,
        )
    return rows
