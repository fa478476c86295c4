"""Routing metrics: streaming, mergeable counts and the frames that are finalised from them."""
