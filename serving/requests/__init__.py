"""Clients' requests: reads and checks bodies, fields, images and videos."""
