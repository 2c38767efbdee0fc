"""Pure functions: advantages (numpy, host), surrogates, Gaussian densities, masked sums (jax), option checks."""
