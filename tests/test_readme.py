"""The README's first example runs as pasted and ends in the number it promises."""

import pathlib
import re

README = pathlib.Path(__file__).parents[1] / "README.md"


def example():
    text = README.read_text()
    start = text.index("```python")
    assert text[:start].count("\n") < 25, "the first code comes late"
    return re.search(r"```python\n(.*?)```", text, re.S).group(1)


def test_the_example_is_short_and_gives_the_evidence(capsys):
    code = example()
    assert len(code.strip().splitlines()) <= 20
    names = {}
    exec(code, names)
    printed = capsys.readouterr().out
    verdict = names["dgm"].khat(names["idata"])
    assert abs(verdict.log_evidence - -31.311) < 5 * max(verdict.log_evidence_error, 0.005)
    assert verdict.status == "good" and "posterior: good" in printed and "mu" in printed
    mean = names["idata"].posterior["mu"].values
    assert abs(mean.mean() - 4.397) < 5 * mean.std() / mean.size**0.5  # exact, by quadrature
