"""What tuning makes a model forget: measured while a run goes on, shown at its end, kept by the base's own answers."""
