"""JUDGE: estimates of log p(x), over any model and guide."""
