"""Depth routing: which tokens go through a layer, and which pass it by."""
