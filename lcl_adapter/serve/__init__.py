"""Stored support sets behind an OpenAI-compatible HTTP API.

wire      what goes over the line, checked      images    bytes from a client, bounded before they are decoded
store     support sets on disk                  keys      who asks, and whose sets they see
engine    one model, a queue, kept caches       calibrate probabilities that mean something, "none of these"
api       the routes
"""
