"""Gates: where they go, how they decide, what they cost, and how they are frozen into one static sub-network."""
