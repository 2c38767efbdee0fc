"""``python scatter.py ADDRESS RANK ELEMENTS...``: two processes compare psum_scatter with psum; prints differences."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

address, rank, *sizes = sys.argv[1:]
jax.distributed.initialize(address, 2, int(rank), cluster_detection_method="deactivate", initialization_timeout=60)
mesh = Mesh(np.array(jax.devices()), "x")


def difference(x):
    """The largest difference of this device's part of the sum and the same part of the whole sum."""
    part = jax.lax.psum_scatter(x[0], "x", tiled=True)
    start = jax.lax.axis_index("x") * len(part)
    return jnp.abs(part - jax.lax.dynamic_slice_in_dim(jax.lax.psum(x[0], "x"), start, len(part))).max()[None]


compare = jax.jit(jax.shard_map(difference, mesh=mesh, in_specs=P("x"), out_specs=P("x"), check_vma=False))
for size in map(int, sizes):
    values = np.random.default_rng(int(rank)).integers(-1000, 1000, (1, size)).astype(np.float32)  # sums are exact
    x = jax.make_array_from_process_local_data(NamedSharding(mesh, P("x")), values)
    for _ in range(3):
        print(size, float(compare(x).addressable_data(0)[0]), flush=True)
jax.distributed.shutdown()
