"""Gates in the training loops of other libraries: one thin shell a library, imported by whoever uses that library."""
