#!/bin/sh
# The controller of the cluster in compose.yaml. Its munged serves all containers, by its socket in the volume /run/munge:
# no key has to be given away.
set -eu
install -d -o munge -g munge -m 755 /run/munge
runuser -u munge -- munged
exec slurmctld -D
