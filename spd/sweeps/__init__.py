"""Search over the settings of an experiment."""
