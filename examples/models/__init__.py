"""Networks of full size, each with its batch normalization as an option."""
