"""The folder of a run: its config, checkpoints, metrics and pictures."""
