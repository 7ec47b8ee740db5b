"""The parts of tools/soak.py: trainings, and the faults injected into them."""
