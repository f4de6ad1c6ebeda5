"""The page: teach by photos, ask, compare, talk. It is a client of the API beside it and has no other way to the model."""

MOST = 6  # labels a set, on the page
