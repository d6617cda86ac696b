"""Faults for runs to survive; tools/fault_injection.py injects them, tests/faults/test_faults.py some."""
