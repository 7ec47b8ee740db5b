"""The commands; `python tools/NAME.py` in a checkout, `resbackbone-NAME` where the package is installed."""
