"""The page's layout, and which handler each button calls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from lcl_adapter.page import MAX_LABELS
from lcl_adapter.page.handlers import Handlers
from lcl_adapter.page.texts import label as t

STYLE = (Path(__file__).parent / "style.css").read_text(encoding="utf-8")
# No font is fetched. Greens and greys have a contrast of at least 4.5 to 1 on white, and enough on black.
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


# Gradio's chat field shows its label but does not set aria-label, so a screen reader could not read it.
NAME_THE_FIELD = """() => new MutationObserver(() => {
  const field = document.querySelector('#lcl-message textarea');
  const label = document.querySelector('#lcl-message [data-testid=block-info]');
  if (field && label) field.setAttribute('aria-label', label.textContent.trim());
}).observe(document.body, {childList: true, subtree: true})"""


def make_page(handlers: Handlers) -> gr.Blocks:
    """The whole page. ``handlers`` are called by its buttons and fields."""
    with gr.Blocks(title="lcl-adapter", analytics_enabled=False, delete_cache=(3600, 24 * 3600), fill_width=False) as page:
        gr.Markdown(t("title"), elem_classes="lcl-title")
        gr.Markdown(t("lead"))
        opened = gr.State(None)  # handlers.OpenedSet: the stored set that the fields were filled from
        history = gr.State([])  # list of handlers.ChatMessage
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
        page.load(handlers.begin, None, [*pickers, *models], js=NAME_THE_FIELD)

        examples = [*teach["labels"], *teach["galleries"]]
        set_fields = [teach["status"], opened, teach["name"], teach["count"], *examples, *teach["groups"]]
        teach["add"].click(handlers.add_group, [teach["count"]], [teach["count"], *teach["groups"]])
        teach["save"].click(handlers.save, [teach["name"], opened, *examples], [teach["status"], opened, *pickers])
        teach["load"].click(handlers.load, [teach["stored"]], set_fields)
        teach["remove"].click(handlers.remove, [teach["stored"], opened], [teach["status"], opened, *pickers])
        teach["example"].click(handlers.example, None, [*set_fields, ask["queries"], compare["queries"]])
        teach["clear"].click(handlers.clear, None, set_fields)
        teach["export"].click(handlers.export, [teach["stored"]], [teach["status"], teach["file"]])
        teach["import"].upload(handlers.import_set, [teach["import"]], set_fields)

        ask["button"].click(handlers.ask, [ask["set"], ask["model"], ask["queries"], ask["question"], ask["reject"]], [ask["result"]])
        compare["button"].click(
            handlers.compare, [compare["set"], compare["base"], compare["adapter"], compare["queries"], compare["reject"]], [compare["result"]]
        )

        chat_fields = [chat["message"], history, chat["window"], chat["status"]]
        chat_inputs = [chat["message"], history, chat["model"], chat["set"]]
        chat["message"].submit(handlers.chat, chat_inputs, chat_fields, trigger_mode="multiple")
        chat["stop"].click(handlers.stop, [history], chat_fields)
        chat["forget"].click(handlers.forget, None, chat_fields)
    return page


def _teach() -> dict[str, Any]:
    fields: dict[str, Any] = {"labels": [], "galleries": [], "groups": []}
    with gr.Row(elem_classes="lcl-row"):
        fields["stored"] = gr.Dropdown([], label=t("stored"), scale=3, min_width=200)
        fields["load"] = gr.Button(t("load"), min_width=80)
        fields["remove"] = gr.Button(t("remove"), variant="stop", min_width=80)
        fields["example"] = gr.Button(t("example"), min_width=140)
    fields["status"] = gr.HTML('<p role="status"></p>')
    fields["count"] = gr.State(2)
    with gr.Row():
        for number in range(MAX_LABELS):
            with gr.Column(visible=number < 2, min_width=280) as group:
                fields["labels"].append(gr.Textbox(label=t("group"), max_length=200, elem_id=f"lcl-label-{number}"))
                fields["galleries"].append(_gallery(t("photos"), f"lcl-group-{number}"))
            fields["groups"].append(group)
    with gr.Row(elem_classes="lcl-row"):
        fields["add"] = gr.Button(t("add_group"), min_width=120)
        fields["clear"] = gr.Button(t("clear"), min_width=80)
        fields["name"] = gr.Textbox(label=t("set_name"), info=t("set_name_info"), value="", max_length=64, scale=3, min_width=200)
        fields["save"] = gr.Button(t("save"), variant="primary", min_width=120)
    with gr.Accordion(t("copy"), open=False):
        fields["export"] = gr.Button(t("export"))
        fields["file"] = gr.File(label=t("exported"), interactive=False, height=90)
        fields["import"] = gr.File(label=t("import"), file_types=[".zip"], height=140)
    return fields


def _ask() -> dict[str, Any]:
    with gr.Row():
        fields: dict[str, Any] = {"set": gr.Dropdown([], label=t("set"), min_width=200)}
        fields["model"] = gr.Dropdown([], label=t("model"), min_width=160)
    fields["queries"] = _gallery(t("queries"), "lcl-queries")
    fields["question"] = gr.Textbox(label=t("question"), info=t("question_info"), max_length=500)
    fields["reject"] = gr.Checkbox(True, label=t("reject"), info=t("reject_info"))
    fields["button"] = gr.Button(t("ask_button"), variant="primary")
    fields["result"] = gr.HTML('<p role="status"></p>', elem_id="lcl-answer", min_height=80)
    return fields


def _compare() -> dict[str, Any]:
    with gr.Row():
        fields: dict[str, Any] = {"set": gr.Dropdown([], label=t("set"), min_width=200)}
        fields["base"] = gr.Dropdown([], label=t("base"), min_width=160)
        fields["adapter"] = gr.Dropdown([], label=t("adapter"), min_width=160)
    fields["queries"] = _gallery(t("queries"), "lcl-compared")
    fields["reject"] = gr.Checkbox(False, label=t("reject"), info=t("reject_info"))
    fields["button"] = gr.Button(t("compare_button"), variant="primary")
    fields["result"] = gr.HTML('<p role="status"></p>', elem_id="lcl-comparison", min_height=80)
    return fields


def _gallery(label: Any, name: str) -> gr.Gallery:
    """A field for photos. Files are not decoded, so the stored bytes are the visitor's own."""
    return gr.Gallery(
        label=label, type="filepath", file_types=["image"], columns=3, height=240, interactive=True, object_fit="contain", fit_columns=False,
        elem_id=name,
    )  # fmt: skip


def _chat() -> dict[str, Any]:
    fields: dict[str, Any] = {}
    with gr.Row():
        fields["model"] = gr.Dropdown([], label=t("model"), min_width=160)
        fields["set"] = gr.Dropdown([("–", "")], value="", label=t("with_set"), min_width=200)
    fields["window"] = gr.Chatbot(label=t("conversation"), height=360, elem_id="lcl-talk", buttons=[])
    fields["message"] = gr.MultimodalTextbox(
        label=t("message"), info=t("message_hint"), file_types=["image"], file_count="multiple", elem_id="lcl-message"
    )
    fields["status"] = gr.HTML('<p role="status"></p>')
    with gr.Row():
        fields["stop"] = gr.Button(t("stop"), min_width=80)
        fields["forget"] = gr.Button(t("forget"), min_width=80)
    return fields
