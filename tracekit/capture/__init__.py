"""Capture: traces from a model that runs, in a server or in this process, straight into a store."""
