"""Training, whatever is trained: run folder, distributed start, schedules, update step, exact resume."""
