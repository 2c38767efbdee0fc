"""Sampling: the one image sampler, the collector of an epoch, rewards on host threads."""
