"""What `--sampler` accepts, apart from the samplers so that `--help` loads nothing heavy."""

SAMPLERS = ("knapsack", "tpe", "nsgaii", "gp", "random")
