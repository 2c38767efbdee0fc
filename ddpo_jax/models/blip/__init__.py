"""BLIP (Li et al. 2022, arXiv:2201.12086): a vision transformer, and BERT with cross-attention to its tokens.

``vision`` and ``text`` are the parts; ``networks`` puts them together as the two networks that score images,
ImageReward and visual question answering; ``checkpoint`` reads their published files under either naming scheme;
``wordpiece`` is the tokenizer.
"""
