"""One file per algorithm. A file turns scalars per (sample, step) into a loss and sees no network, file or device.

Each module has four functions:

- ``default_config() -> ConfigDict``: the options of this algorithm, the only home of their defaults.
- ``traits(config) -> types.Traits``: what it uses; an option outside its rule raises InputError here.
- ``advantages(rewards f64[N], prompt_ids i64[N], stats, config) -> f64[N]``: numpy, on the host, once per rollout.
- ``loss(terms, batch, config)``: jax, unreduced. Separable: [N, S], entry (n, s) from the terms of (n, s) alone.
  Coupled: any shape whose plain mean is the loss, masked entries already left out.

Policy-gradient losses of a whole trajectory are divided by the number of trained steps, as those of single steps are
(spec: gradients are averaged over steps and samples), so methods compare at equal learning rates.
"""
