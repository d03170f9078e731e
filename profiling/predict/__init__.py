"""Times of a bundle's graphs on a device that is not at hand, from counted work and fitted efficiencies."""
