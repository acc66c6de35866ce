"""The ways to tune a model: which flags go with which, what trains, what a checkpoint of each holds, what takes turns on one frozen base."""
