"""Speed and memory, measured."""

from dinoreg.threads import set_patience

set_patience()  # as the `dinoreg` command does, and as early
