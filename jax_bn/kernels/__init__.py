"""Hand-written stages, one file for each way of lowering them; imported by `_implementation`."""
