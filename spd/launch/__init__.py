"""Many jobs, on this machine or on SLURM."""
