"""Typed answers with probabilities from one prefill: questions, their wording, and the scores of their labels."""
