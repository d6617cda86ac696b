"""Damaged and hostile files for every reader; tools/fuzz.py runs them, tests/faults/test_hostile_files.py some."""
