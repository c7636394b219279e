"""Run registered experiments and compare them with what is expected of them."""
