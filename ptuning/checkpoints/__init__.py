"""What lies on the disk: weight files, sidecars, and the folders of runs, written completely or not at all."""
