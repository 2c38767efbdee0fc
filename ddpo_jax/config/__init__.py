"""The configuration: every key and its default, what the machine fills in, overrides, and which values go together."""

from ddpo_jax.config.defaults import choose, default_config
from ddpo_jax.config.override import with_choices

__all__ = ["choose", "default_config", "with_choices"]
