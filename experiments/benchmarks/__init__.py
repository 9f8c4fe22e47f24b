"""Speed against Pyro, NumPyro, pythae and hand-written torch, after a check that all agree."""
