"""A web page to show photos, classify, compare and chat.

It is a client of the API beside it, and has no other access to the model.

server    the page and the API on one address
blocks    the layout, and which handler each button calls
handlers  what each button does
photos    photos between the browser, files and the API
html      results as HTML
texts     all texts, in English and Japanese
"""

MAX_LABELS = 6  # of a set on the page
