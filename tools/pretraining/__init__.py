"""The parts of tools/pretrain.py: what it is asked for, and how a classifier is evaluated."""
