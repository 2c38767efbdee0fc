"""One program on many hosts: who takes part, how they start and end together, and what they tell each other.

Every process of a run executes the same program. What is small (prompts, rewards, advantages, the order of the samples)
every process holds whole and equal, so that every choice is the same everywhere; what is big (trajectories, images)
stays with the process that made it (``types.Spread``). With one process nothing here does anything.
"""
