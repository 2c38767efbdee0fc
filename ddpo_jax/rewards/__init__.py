"""Rewards: what an image is worth. One file per reward; a new file is found by its name (``reward.name``).

A reward module defines::

    def default_config() -> ConfigDict                    # the reward's options, every key commented
    def make(config) -> fn                                # loads what it needs; InputError if that is missing
    fn(images u8[N,H,W,3], prompts list[str], metadata list[dict]) -> (f32[N], dict[str, f32[N]])

Higher is better. ``fn`` runs on a host thread while the device samples the next batch: it keeps no state between calls,
is deterministic, does not mutate its arguments, and scores every image on its own (permuting the batch permutes the
scores). The parts are logged as ``reward/<part>``; a part is NaN for the images it does not apply to, a score never is.

Or a reward may compare the images of a prompt with each other: if its ``fn`` has ``groupwise = True``, every call is of
the K = ``prompts.samples_per_prompt`` images of one draw of a prompt, all of them, in the order in which they were
drawn. The K scores must be comparable; those of another prompt need not be.

A reward whose ``fn`` has ``decoupled = {part: weight}`` asks for the sum of those parts' advantages, each standardised
within its prompt, in place of its score's (``reward.normalise`` of ``weighted``).

A reward that waits for others, such as people or a server, may take as long as it likes if its ``fn`` is an object with
``waits_for_others = True``; then it says in the log what it waits for, and its method ``close()`` ends the wait. In a
run of several processes it is made and asked by process 0 alone, for the images of all; any other reward scores in each
process the images that were drawn there.

A reward with networks declares ``AUTO = {key: (value with the miniature, value with any other model)}`` for the options
whose default "auto" depends on the model; ``ddpo_jax.config.resolve`` fills them. One that reads only the miniature's
pictures declares ``MINIATURE_ONLY = True``; any other model is refused at the start. The exact definition of a reward
(sign, scale, network, preprocessing) is in its module's docstring. Files with a leading underscore are shared helpers.
"""
