"""Predicts the times of a bundle's graphs on another device, from counted work and fitted efficiencies."""
