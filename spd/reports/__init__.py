"""What a reader sees of a run: figures, results and the report."""
