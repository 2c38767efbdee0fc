"""The policy: noise schedule, DDIM step with log-probability, guidance and the sampler."""
