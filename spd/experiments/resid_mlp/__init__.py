"""Residual MLPs: compressed computation and cross-layer distributed representations."""
