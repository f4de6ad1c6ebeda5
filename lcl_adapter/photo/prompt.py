"""The photo base's prompt: SmolLM2's own chat format, and a short form for a turn that is a picture alone.

In the short form an episode reads as a list of pictures and labels, one a line. That is the form of text in which language
models look up earlier pairs by themselves; in the chat format, seven tokens of frame stand between a picture and its label. Nothing
stands between them here, so that a picture's own key predicts the label, and no copy of it (docs/lab.md, the photo base).
"""

from __future__ import annotations

IMAGE = "<image>"
SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>"
USER, ASSISTANT, ANSWER = "\n<|im_start|>user\n{image}{text}<|im_end|>", "\n<|im_start|>assistant\n", "{text}"
SHORT_USER, SHORT_ASSISTANT, SHORT_ANSWER = "\n{image}{text}", "", " {text}"
END = "<|im_end|>"


def chat_template(image_token: str = IMAGE) -> str:
    """The prompt as a Jinja template. A system message goes before the next user's text."""
    read = (  # the text and the number of images of a message
        "{% set ns.text = '' %}{% set ns.images = 0 %}{% if m['content'] is string %}{% set ns.text = m['content'] %}{% else %}"
        "{% for c in m['content'] %}{% if c['type'] == 'text' %}{% set ns.text = ns.text + c['text'] %}"
        "{% else %}{% set ns.images = ns.images + 1 %}{% endif %}{% endfor %}{% endif %}"
    )
    image = repr(image_token)
    return (
        f"{{{{ {SYSTEM!r} }}}}{{% set ns = namespace(text='', images=0, short=false, first='') %}}"
        "{% for m in messages %}" + read + "{% if m['role'] in ['system', 'developer'] %}"
        "{% set ns.first = ns.first + ns.text + '\\n' %}"
        "{% elif m['role'] == 'user' %}{% set ns.text = ns.first + ns.text %}{% set ns.first = '' %}"
        "{% set ns.short = ns.images == 1 and not ns.text %}"
        f"{{{{ '\\n' if ns.short else '\\n<|im_start|>user\\n' }}}}{{{{ {image} * ns.images }}}}{{{{ ns.text if ns.short else ns.text + {END!r} }}}}"
        f"{{% else %}}{{{{ (' ' if ns.short else {ASSISTANT!r}) + ns.text + {END!r} }}}}{{% endif %}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ '' if ns.short else {ASSISTANT!r} }}}}{{% endif %}}"
    )
