"""What every room may use: failures, files, flags, plots, processes, reports."""
