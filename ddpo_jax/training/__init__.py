"""The training loop, the updates of an epoch, and the parts they are built from."""
