"""Replay: past trajectories are trained on again. ``buffer`` keeps them; a rule, one file each, says which come back.

A rule defines ``default_config()``, ``SOURCE`` ("past": the buffer; "current": the epoch just sampled; "nothing") and
``priority(rewards f32[N], advantages f32[N], age i64[N] in epochs, rng, config) -> f64[N]``. The samples of the highest
priority come back first; those of minus infinity never do. The advantages are those that the loss trains on.
"""
