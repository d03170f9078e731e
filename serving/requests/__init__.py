"""Requests of clients: bodies, fields, images and videos, each checked."""
