"""Where the numbers in polar_deploy/devices come from: one script a compiler, run with the Python that has it."""
