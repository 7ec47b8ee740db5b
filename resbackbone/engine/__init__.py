"""Training of any network: run folder, distributed start, schedule, loop, exact resume."""

from resbackbone.checks import require

require("train", "yaml", user="resbackbone.engine")
