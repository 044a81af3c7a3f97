"""The parts of `reproduce_paper.py`, in the order in which they run."""
