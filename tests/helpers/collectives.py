"""``python collectives.py ADDRESS RANK ELEMENTS...``: what two processes of one device tell each other, against numpy.

Prints the name of the collective, the number of elements and the largest difference, three times each.
"""

import sys

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from ddpo_jax import sharding

address, rank, *sizes = sys.argv[1:]
jax.distributed.initialize(address, 2, int(rank), cluster_detection_method="deactivate", initialization_timeout=60)
mesh = sharding.make_mesh(1, 2)
FUNCTIONS = {
    "scatter_grads": (lambda x: sharding.scatter_grads({"x": x[0]}, {"x": P("fsdp")})["x"], P("fsdp")),
    "psum_scatter": (lambda x: jax.lax.psum_scatter(x[0], "fsdp", tiled=True), P("fsdp")),
    "psum": (lambda x: jax.lax.psum(x[0], "fsdp"), P()),
    "gather_params": (lambda x: sharding.gather_params({"x": x[0]}, {"x": P("fsdp")})["x"], P()),
}

for size in map(int, sizes):
    table = np.stack([np.random.default_rng(seed).integers(-1000, 1000, size).astype(np.float32) for seed in (0, 1)])
    batch = sharding.put_batch(table[int(rank)][None], mesh)
    for name, (function, out) in FUNCTIONS.items():
        expected = table.reshape(-1) if name == "gather_params" else table.sum(0)  # exact: whole numbers
        compiled = jax.jit(jax.shard_map(function, mesh=mesh, in_specs=P("fsdp"), out_specs=out, check_vma=False))
        for _ in range(3):
            (shard,) = compiled(batch).addressable_shards
            print(name, size, np.abs(np.asarray(shard.data) - expected[shard.index]).max(), flush=True)
jax.distributed.shutdown()
