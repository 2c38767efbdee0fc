"""One file per algorithm. A file turns scalars per (sample, step) into a loss and sees no network, file or device.

Each module has four functions:

- ``default_config() -> ConfigDict``: the options of this algorithm, the only home of their defaults.
- ``traits(config) -> types.Traits``: what the algorithm uses. An option outside its rule raises InputError here.
- ``advantages(rewards f64[N], prompt_ids i64[N], stats, config) -> f64[N]``: numpy, on the host, once per rollout.
- ``loss(terms, batch, config)``: jax, not reduced. A separable loss is [N, S], and its entry (n, s) depends on the
  terms of (n, s) alone. A coupled loss has any shape whose plain mean is the loss; it leaves masked entries out itself.

Timestep weights multiply the loss of a step (of a coupled loss, its derivative by the terms of that step). A penalty
that they must leave alone, such as a KL to the pretrained model, is a fifth function ``penalty(terms, batch, config)``
of the same kind, which is added to the loss ("Selective Timestep Weighting", section 4.2: the weights multiply the
advantage). ``weighting.kl`` weighs it too.

A policy-gradient loss of a whole trajectory is divided by the number of trained steps, as the learner divides those of
single steps: every gradient is an average over steps and samples, so algorithms compare at equal learning rates.
Papers are cited by author and year; ``docs/references.md`` has their titles and arXiv ids.
"""
