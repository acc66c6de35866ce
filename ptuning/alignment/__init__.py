"""Training on preferences: rewards, and the losses of pairs of answers and of answers that are rewarded."""
