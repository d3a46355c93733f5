"""Read the configuration: every key, its limits, and every mistake with its line."""

from cmtrain.errors import check_pipelines

check_pipelines()  # here, since what imports pipelines imports the configuration first
