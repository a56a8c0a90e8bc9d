"""Submit and watch runs of dinoreg: on Slurm, on this machine, or right here for a debugger."""
