"""Images that strangers send: bounds, costs before decoding, and the processes that decode them."""
