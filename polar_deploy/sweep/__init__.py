"""Many runs at once: budgets × seeds × targets, trained side by side on Ray, and timed one after the other."""
