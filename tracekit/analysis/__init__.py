"""The public functions that ask a store: which metric, of what, saved where."""
