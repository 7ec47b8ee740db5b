"""The trainings that tools/soak.py and tools/gpu_check.py start, kill and compare."""
