"""dinoreg and another public trainer, doing the same work in turn on the same machine."""
