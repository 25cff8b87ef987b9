"""Circuits: mechanism, merging and diff on the clinical world, graphs of 10,000 nodes, representation shift."""
