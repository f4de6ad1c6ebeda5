"""What a request passes before a route answers it: connections, origins, keys, bodies."""
