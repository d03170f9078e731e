"""Synthetic images of shapes and digits, with questions and answers."""
