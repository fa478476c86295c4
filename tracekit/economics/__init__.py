"""What routing is worth: models of hardware and time, from numbers to numbers."""
