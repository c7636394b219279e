"""Runs of the published implementation (June 2025), as runs of this package."""
