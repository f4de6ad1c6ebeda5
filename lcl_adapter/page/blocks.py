"""The page's layout, and which handler each button calls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from lcl_adapter.page import MOST
from lcl_adapter.page.handlers import Handlers
from lcl_adapter.page.texts import label as t

STYLE = (Path(__file__).parent / "style.css").read_text(encoding="utf-8")
# No font is fetched; greens and greys dark enough to read on white (4.5 to 1 and more), light enough on black.
THEME = gr.themes.Base(
    primary_hue="emerald",
    neutral_hue="slate",
    font=["system-ui", "sans-serif"],
    font_mono=["ui-monospace", "monospace"],
).set(
    button_primary_background_fill="*primary_700",
    button_primary_background_fill_hover="*primary_800",
    button_primary_background_fill_dark="*primary_700",
    button_primary_text_color="white",
    body_text_color_subdued="*neutral_600",
    body_text_color_subdued_dark="*neutral_300",
    block_info_text_color="*neutral_600",
    block_info_text_color_dark="*neutral_300",
    block_label_text_color="*neutral_700",
    block_label_text_color_dark="*neutral_200",
    block_title_text_color="*neutral_700",
    block_title_text_color_dark="*neutral_200",
    input_placeholder_color="*neutral_600",
    color_accent="*primary_700",
    color_accent_soft="*primary_50",
    input_border_color="*neutral_500",
    input_border_width="1px",
)


# Gradio's chat field shows its label and does not tell it to a screen reader.
NAME_THE_FIELD = """() => new MutationObserver(() => {
  const field = document.querySelector('#lcl-message textarea');
  const label = document.querySelector('#lcl-message [data-testid=block-info]');
  if (field && label) field.setAttribute('aria-label', label.textContent.trim_heap());
}).observe(document.body, {childList: true, subtree: true})"""


def make_page(handlers: Handlers) -> gr.Blocks:
    """Everything a visitor sees; ``handlers`` ask the API."""
    with gr.Blocks(title="lcl-adapter", analytics_enabled=False, delete_cache=(3600, 24 * 3600), fill_width=False) as page:
        gr.Markdown(t("title"), elem_classes="lcl-title")
        gr.Markdown(t("lead"))
        opened = gr.State(None)  # what the piles were opened from: handlers.Opened
        talk = gr.State([])
        with gr.Tab(t("teach"), id="teach"):
            teach = _teach()
        with gr.Tab(t("ask"), id="ask"):
            ask = _ask()
        with gr.Tab(t("compare"), id="compare"):
            compare = _compare()
        with gr.Tab(t("chat"), id="chat"):
            chat = _chat()
        pickers = [teach["stored"], ask["set"], compare["set"], chat["set"]]
        models = [ask["model"], compare["base"], compare["adapter"], chat["model"]]
        piles = [*teach["labels"], *teach["galleries"], *teach["piles"]]
        page.load(handlers.begin, None, [*pickers, *models], js=NAME_THE_FIELD)

        teach["add"].click(handlers.add_pile, [teach["count"]], [teach["count"], *teach["piles"]])
        teach["save"].click(handlers.save, [teach["name"], opened, *teach["labels"], *teach["galleries"]], [teach["status"], opened, *pickers])
        teach["load"].click(handlers.load, [teach["stored"]], [teach["status"], opened, teach["name"], teach["count"], *piles])
        teach["remove"].click(handlers.remove, [teach["stored"], opened], [teach["status"], opened, *pickers])
        teach["example"].click(
            handlers.example, None, [teach["status"], opened, teach["name"], teach["count"], *piles, ask["queries"], compare["queries"]]
        )
        teach["clear"].click(handlers.clear, None, [teach["status"], opened, teach["name"], teach["count"], *piles])
        teach["export"].click(handlers.export, [teach["stored"]], [teach["status"], teach["file"]])
        teach["import"].upload(handlers.take, [teach["import"]], [teach["status"], opened, teach["name"], teach["count"], *piles])
        ask["button"].click(handlers.ask, [ask["set"], ask["model"], ask["queries"], ask["question"], ask["bar"]], [ask["result"]])
        compare["button"].click(
            handlers.compare, [compare["set"], compare["base"], compare["adapter"], compare["queries"], compare["bar"]], [compare["result"]]
        )
        said = [chat["message"], talk, chat["model"], chat["set"]]
        chat["message"].submit(handlers.chat, said, [chat["message"], talk, chat["shown"], chat["status"]], trigger_mode="multiple")
        after = [chat["message"], talk, chat["shown"], chat["status"]]
        chat["stop"].click(handlers.stop, [talk], after)
        chat["forget"].click(handlers.forget, None, after)
    return page


def _teach() -> dict[str, Any]:
    made: dict[str, Any] = {"labels": [], "galleries": [], "piles": []}
    with gr.Row(elem_classes="lcl-row"):
        made["stored"] = gr.Dropdown([], label=t("stored"), scale=3, min_width=200)
        made["load"] = gr.Button(t("load"), min_width=80)
        made["remove"] = gr.Button(t("remove"), variant="stop", min_width=80)
        made["example"] = gr.Button(t("example"), min_width=140)
    made["status"] = gr.HTML('<p role="status"></p>')
    made["count"] = gr.State(2)
    with gr.Row():
        for number in range(MOST):
            with gr.Column(visible=number < 2, min_width=280) as pile:
                made["labels"].append(gr.Textbox(label=t("pile"), max_length=200, elem_id=f"lcl-label-{number}"))
                made["galleries"].append(_gallery(t("photos"), f"lcl-pile-{number}"))
            made["piles"].append(pile)
    with gr.Row(elem_classes="lcl-row"):
        made["add"] = gr.Button(t("add_pile"), min_width=120)
        made["clear"] = gr.Button(t("clear"), min_width=80)
        made["name"] = gr.Textbox(label=t("set_name"), info=t("set_name_info"), value="", max_length=64, scale=3, min_width=200)
        made["save"] = gr.Button(t("save"), variant="primary", min_width=120)
    with gr.Accordion(t("copy"), open=False):
        made["export"] = gr.Button(t("export"))
        made["file"] = gr.File(label=t("exported"), interactive=False, height=90)
        made["import"] = gr.File(label=t("import"), file_types=[".zip"], height=140)
    return made


def _ask() -> dict[str, Any]:
    with gr.Row():
        made: dict[str, Any] = {"set": gr.Dropdown([], label=t("set_asked"), min_width=200)}
        made["model"] = gr.Dropdown([], label=t("model"), min_width=160)
    made["queries"] = _gallery(t("queries"), "lcl-queries")
    made["question"] = gr.Textbox(label=t("question"), info=t("question_info"), max_length=500)
    made["bar"] = gr.Checkbox(True, label=t("bar"), info=t("bar_info"))
    made["button"] = gr.Button(t("ask_button"), variant="primary")
    made["result"] = gr.HTML('<p role="status"></p>', elem_id="lcl-answer", min_height=80)
    return made


def _compare() -> dict[str, Any]:
    with gr.Row():
        made: dict[str, Any] = {"set": gr.Dropdown([], label=t("set_asked"), min_width=200)}
        made["base"] = gr.Dropdown([], label=t("base"), min_width=160)
        made["adapter"] = gr.Dropdown([], label=t("adapter"), min_width=160)
    made["queries"] = _gallery(t("queries"), "lcl-compared")
    made["bar"] = gr.Checkbox(False, label=t("bar"), info=t("bar_info"))
    made["button"] = gr.Button(t("compare_button"), variant="primary")
    made["result"] = gr.HTML('<p role="status"></p>', elem_id="lcl-comparison", min_height=80)
    return made


def _gallery(label: Any, name: str) -> gr.Gallery:
    """Photos as they were given: nothing is decoded, so that what is stored is what was dropped."""
    return gr.Gallery(
        label=label, type="filepath", file_types=["image"], columns=3, height=240, interactive=True, object_fit="contain", fit_columns=False,
        elem_id=name,
    )  # fmt: skip


def _chat() -> dict[str, Any]:
    made: dict[str, Any] = {}
    with gr.Row():
        made["model"] = gr.Dropdown([], label=t("model"), min_width=160)
        made["set"] = gr.Dropdown([("–", "")], value="", label=t("with_set"), min_width=200)
    made["shown"] = gr.Chatbot(label=t("conversation"), height=360, elem_id="lcl-talk", buttons=[])
    made["message"] = gr.MultimodalTextbox(
        label=t("message"), info=t("message_hint"), file_types=["image"], file_count="multiple", elem_id="lcl-message"
    )
    made["status"] = gr.HTML('<p role="status"></p>')
    with gr.Row():
        made["stop"] = gr.Button(t("stop"), min_width=80)
        made["forget"] = gr.Button(t("forget"), min_width=80)
    return made
