"""Pure functions: advantages and steps (numpy, host), surrogates, Gaussians, masked sums (jax), option checks."""
