"""Lists the published weights that rewards and models read, where they are, and whether they are the published files.

A file is looked for in --weights-dir (the config's reward.weights_dir), in the folder that the variable DDPO_WEIGHTS
names, in ~/.cache/ddpo_jax/weights, and in the model hub's cache. In a folder it is OWNER/REPOSITORY/FILE. What is not
there is downloaded at its first use; with NAME now, and with --weights-dir into that folder, which can then be carried
to a machine without internet.

examples:
  ddpo_jax weights
  ddpo_jax weights --verify
  ddpo_jax weights hps_v2_1 clip_tokenizer --weights-dir=weights
"""

from __future__ import annotations

from collections.abc import Sequence

from ddpo_jax.commands import _cli as cli
from ddpo_jax.errors import InputError
from ddpo_jax.models.weights import fetch
from ddpo_jax.studies.tables import aligned


def main(argv: Sequence[str]) -> None:
    """The command."""
    parser = cli.Parser("weights", __doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="download these; default: list all")
    parser.add_argument("--weights-dir", default="", help="a folder of such files, looked into first")
    parser.add_argument("--verify", action="store_true", help="compute the checksum of every file that is there")
    args = parser.parse_args(argv)
    if args.names:
        if args.verify:
            raise InputError("--verify: received with NAME; a download is verified anyway; leave out one of them")
        into = cli.folder_to_write(args.weights_dir, "--weights-dir") if args.weights_dir else None
        cli.show_log()
        for path in [fetch.get(name, into) for name in args.names]:
            print(path)
        return
    found, faults = fetch.survey(args.weights_dir, verify_all=args.verify)
    print(aligned([("name", "for", "size", "licence", "state"), *found]))
    places = [*map(str, fetch.folders(args.weights_dir)), "the hub's cache"]
    print(f"\nlooked for in: {', '.join(places)}")
    if faults:
        raise InputError("\n".join(faults))
