"""A web page to show photos, classify, compare and chat.

It is a client of the API beside it, and has no other access to the model.

server    the page and the API on one address
blocks    the layout, and which handler each button calls
handlers  what each button does
photos    photos between the browser, files and the API
pictures  files on disk: decoded and encoded again, a folder for each visitor
guard     in front of Gradio: which of its routes exist, and for whom
visitors  log-ins, and what belongs to whom
scratch   the folder of all files, removed when the server ends
html      results as HTML
texts     all texts, in English and Japanese
"""

MAX_LABELS = 6  # of a set on the page
