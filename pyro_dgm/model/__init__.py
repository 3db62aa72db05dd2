"""A Pyro model seen from outside: its sites, many runs of it at once, and its log density."""
