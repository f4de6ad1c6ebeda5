"""Stored support sets behind an OpenAI-compatible HTTP API.

server        loads the model and listens
api           the routes
connections   deadlines of a client's connection, and how many there are
middleware    access, body size, requests a caller and timing, before a route runs
origins       no other web page reaches the server
bodies        JSON bodies, bounded and validated outside the event loop
keys          API keys and their namespaces
service       requests become jobs; replies become API responses
classification, decisions    requests for judgements and for typed decisions
sets          support sets that questions are about, and their calibrations
jobs          the entries of the engine's queue
engine        one model, one thread, one queue
adapters      checks of an adapter before it is served
cache         prefilled support sets in memory
decoding      sampling of tokens, and tokens to text
calibrate     temperature of the probabilities, threshold of "none of these"
images        images from a client, bounded before they are decoded
costs         parts of an image file, counted before it is decoded
workers       processes in which images are decoded
worker        one of them
store         support sets on disk
folders       a support set as a folder of photos
support_sets  the `support` commands
metrics       counters for Prometheus

The types of requests and responses are in ``answering/api_types.py``, which the client shares.
"""
