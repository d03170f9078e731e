"""Runs of an evaluation: answers, worker processes and the folder that keeps them."""
