"""Training: the full network, and the one pass in which gates learn, polarize and freeze."""
