"""People's judgements of images: asked in a browser, kept in a file, read back as scores and as pairs.

``answers`` is the file, ``queue`` holds what is still to be rated and who has it, ``app`` is the web page and what it
talks to. The reward that waits for people is ``ddpo_jax/rewards/human.py``.
"""
