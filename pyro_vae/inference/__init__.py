"""FIT: objectives and the SVI step, over any model and guide."""
