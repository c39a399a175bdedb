"""Beyond training: Hugging Face folders in and out, downstream tasks, SLURM."""
