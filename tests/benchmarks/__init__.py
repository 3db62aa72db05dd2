"""Scripts that print ratios against peers, in one run, and write JSON: ``python -m tests.benchmarks NAME``."""
