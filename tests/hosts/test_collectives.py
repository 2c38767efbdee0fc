"""The sums over processes on CPUs are right: wrong ones were reported to be silent (jax issue 40830)."""

import os
import pathlib
import socket
import subprocess
import sys

HELPER = pathlib.Path(__file__).resolve().parents[1] / "helpers" / "scatter.py"
SIZES = [2**18, 2**20 - 2, 2**20, 2**20 + 2, 2**21, 2**22]  # f32 elements: parts of 0.5 to 8 MiB, some around 4 MiB


def test_psum_scatter_is_the_slice_of_psum():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    started = [
        subprocess.Popen(
            [sys.executable, HELPER, address, str(rank), *map(str, SIZES)],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in started:
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0
        found = [line.split() for line in output.splitlines() if not line.startswith("[Gloo]")]
        assert [int(size) for size, _ in found] == [size for size in SIZES for _ in range(3)]
        assert {float(difference) for _, difference in found} == {0.0}, output
