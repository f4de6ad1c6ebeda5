"""Stored support sets behind an OpenAI-compatible HTTP API.

wire      what goes over the line, checked           images    bytes from a client, bounded before they are decoded
store     support sets on disk                       shelf     the same from a shell
keys      who asks, and whose sets they see          gate      what is refused before a body is read
speech    tokens drawn, and made text                jobs      what waits for the model
engine    one model, a queue, kept sets              calibrate probabilities that mean something, "none of these"
service   requests to jobs, replies to answers       api       the routes; metrics; server, which loads and listens
"""
