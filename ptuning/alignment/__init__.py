"""Training on preferences: rewards, the losses of pairs of answers, and what takes turns on one frozen base."""
