"""What a program costs: counters, and the runs whose results stand in `results/`."""
