"""Target models, their training, and the decomposition scripts. Nothing in the core imports this."""
