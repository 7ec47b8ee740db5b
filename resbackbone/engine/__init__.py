"""Training, whatever is trained: run folder, distributed start, schedules, update step, exact resume."""

from resbackbone.checks import require

require("train", "yaml", user="resbackbone.engine")
