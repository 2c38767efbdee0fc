"""Flax NNX modules that read and write diffusers folders: UNet, VAE, CLIP, and the pipeline that ties them together.

Attribute names follow the state dicts of PyTorch diffusers and transformers, so that the map from file to parameter is
a rule and not a table: ``weight`` becomes ``kernel`` (transposed), ``scale`` in norms and ``embedding`` in embeddings.
"""
