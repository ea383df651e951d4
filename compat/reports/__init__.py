"""How a run is shown: the log entry and the terminal. Both read a Run and nothing else."""
