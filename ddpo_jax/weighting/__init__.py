"""Timestep weightings, one file each: how much every denoising step of a trajectory counts in the update.

A member defines ``default_config()`` and ``weights(latents f32[N,T+1,h,w,c], transition, config) -> f32[N,T]``, up to a
factor per trajectory: ``ops.steps.normalise`` gives every trajectory's trained steps mean 1, in one place. A member
with options that can be wrong also defines ``check(config, num_steps)``: InputError before anything is loaded.
"""
