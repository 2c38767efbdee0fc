"""HTTP on this side of the wire: a small JSON server, the protocol of rewards, and a reward that is served by it.

``server`` listens (limits, token, clean end), ``protocol`` turns images into JSON and back, ``compute`` answers
``GET /health`` and ``POST /compute``. What people do in a browser is in ``ddpo_jax.feedback``; the client that asks
another machine for rewards is ``ddpo_jax/rewards/remote.py``.
"""
