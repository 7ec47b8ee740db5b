"""What tools/soak.py is made of: trainings, and the faults they are given."""
