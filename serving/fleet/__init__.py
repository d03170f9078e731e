"""Replicas of a pipeline in processes of their own, on one machine or several, with Ray Serve."""
