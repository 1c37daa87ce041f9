"""One HTML page of runs and their logs, and what a checkpoint holds."""
