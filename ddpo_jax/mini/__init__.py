"""The embedded default: a complete Stable Diffusion in miniature, and the little world of captioned shapes it draws.

``world`` renders scenes and writes their captions, ``verifier`` says how much of a caption an image shows, ``rating``
is the stated taste that the miniature aesthetic head learns. Everything here is made by
``ddpo_jax pretrain`` from a seed.
"""
