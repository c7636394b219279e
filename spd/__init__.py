"""Stochastic Parameter Decomposition: weight matrices as sums of causally gated rank-one parts."""
