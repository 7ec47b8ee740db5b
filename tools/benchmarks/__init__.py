"""The parts of tools/benchmark.py: what is compared, how it is measured, and how it is reported."""

from resbackbone.compat import check_torchvision

check_torchvision()
