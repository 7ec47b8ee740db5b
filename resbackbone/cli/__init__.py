"""The terminal: options, help, progress and one-line errors of the commands."""
