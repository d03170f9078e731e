"""What clients send: bodies, fields, images and videos, each checked."""
