"""Measurements, run by hand; what they gave stands in README.md."""
