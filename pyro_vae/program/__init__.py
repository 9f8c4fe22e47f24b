"""SAY: conditional distributions, priors, and the programs made of them."""
