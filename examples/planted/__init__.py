"""The parts of planted_study.py."""
