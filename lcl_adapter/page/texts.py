"""What the page says, in English and Japanese. Labels are put in the reader's language by the browser, answers by the server."""

from __future__ import annotations

import gradio as gr

ENGLISH = {
    "title": "# Teach by photos",
    "lead": "Show a few photos of each kind, and the model judges new ones by them. Nothing is trained here; what you teach is kept under a name.",
    "teach": "Teach",
    "ask": "Ask",
    "compare": "Compare",
    "chat": "Chat",
    "stored": "Stored set",
    "load": "Open",
    "remove": "Remove",
    "example": "Try the example",
    "set_name": "Name of the set",
    "set_name_info": "letters, digits, dots and dashes",
    "pile": "Label",
    "photos": "Photos of this label",
    "add_pile": "Add a label",
    "save": "Save",
    "export": "Download as a folder",
    "exported": "The set, as a zip file",
    "import": "Take a downloaded set",
    "copy": "A copy of the set: as a folder that `lcl-adapter ask` takes",
    "clear": "Clear all",
    "set_asked": "Judge by",
    "model": "Model",
    "queries": "Photos to judge",
    "question": "Question (optional)",
    "question_info": "left empty, what the set or the model was taught to be asked",
    "ask_button": "Judge",
    "bar": "No label for what is unlike all taught photos",
    "bar_info": "off: the nearest label is always given",
    "base": "Base",
    "adapter": "Adapter",
    "compare_button": "Judge with both",
    "with_set": "Show it the set first",
    "nothing": "no set",
    "message": "Message",
    "message_hint": "Ask something; add photos with the clip",
    "conversation": "Conversation",
    "forget": "Start again",
    "stop": "Stop",
}
JAPANESE = {
    "title": "# 写真で教える",
    "lead": "種類ごとに数枚の写真を見せると、新しい写真をそれにならって判定します。学習は行いません。教えた内容は名前を付けて保存されます。",
    "teach": "教える",
    "ask": "判定する",
    "compare": "比べる",
    "chat": "会話",
    "stored": "保存済みのセット",
    "load": "開く",
    "remove": "削除",
    "example": "例を試す",
    "set_name": "セットの名前",
    "set_name_info": "英数字、ピリオド、ハイフン",
    "pile": "ラベル",
    "photos": "このラベルの写真",
    "add_pile": "ラベルを追加",
    "save": "保存",
    "export": "フォルダーとしてダウンロード",
    "exported": "セット（zip ファイル）",
    "import": "ダウンロードしたセットを取り込む",
    "copy": "セットの写し：`lcl-adapter ask` が読むフォルダー",
    "clear": "すべて消す",
    "set_asked": "使うセット",
    "model": "モデル",
    "queries": "判定する写真",
    "question": "質問（任意）",
    "question_info": "空欄なら、セットまたはモデルの既定の質問",
    "ask_button": "判定",
    "bar": "教えた写真のどれにも似ていなければラベルを付けない",
    "bar_info": "オフにすると、常に最も近いラベルを返します",
    "base": "ベース",
    "adapter": "アダプター",
    "compare_button": "両方で判定",
    "with_set": "先にセットを見せる",
    "nothing": "セットなし",
    "message": "メッセージ",
    "message_hint": "質問を入力。クリップから写真を追加できます",
    "conversation": "会話",
    "forget": "最初から",
    "stop": "停止",
}
SAID = {
    "en": {
        "saved": "Saved {name}, version {version}: {counts}.",
        "opened": "Opened {name}, version {version}: {counts}.",
        "removed": "Removed {name}.",
        "taken": "Taken: {count} photos. Give it a name and save it.",
        "example": "Drawings that the shipped base was not trained on. Save them, then judge the photos under Ask.",
        "no_set": "Save or choose a set first.",
        "no_name": "Give the set a name.",
        "no_photos": "Add a photo to judge first.",
        "no_labels": "Give at least two labels with photos.",
        "label_missing": "Pile {number} has photos and no label.",
        "photos_missing": "{label} has no photos.",
        "photo": "Photo",
        "alike": "most like this taught photo: {label}",
        "none": "none of these",
        "nearest": "nearest: {label}",
        "unlike": "Not sure: it looks unlike the photos of {label} (likeness {score:.2f}, this set's photos reach {threshold:.2f} or more).",
        "close": "Not sure: {one} and {other} are close ({first:.0%} and {second:.0%}). More photos that show the difference would help.",
        "weak": "The set is hard to tell apart: of its own photos, asked about one by one without themselves, {right} of {asked} were right.",
        "few": "Two photos a label at least would let the set check itself.",
        "sure": "Sure.",
        "conflict": "Another has saved this set since you opened it. Open it again, or save under another name.",
        "bad_zip": "This is no set that was downloaded here: {why}",
        "failed": "It did not work: {why}",
        "silent": "(no answer)",
        "same": "Both say the same about {same} of {count} photos.",
    },
    "ja": {
        "saved": "{name} をバージョン {version} として保存しました（{counts}）。",
        "opened": "{name} のバージョン {version} を開きました（{counts}）。",
        "removed": "{name} を削除しました。",
        "taken": "写真 {count} 枚を取り込みました。名前を付けて保存してください。",
        "example": "付属ベースの学習に使っていない絵です。保存してから「判定する」で試してください。",
        "no_set": "先にセットを保存するか選んでください。",
        "no_name": "セットに名前を付けてください。",
        "no_photos": "先に判定する写真を追加してください。",
        "no_labels": "写真のあるラベルを二つ以上用意してください。",
        "label_missing": "{number} 番目の写真にラベルがありません。",
        "photos_missing": "{label} の写真がありません。",
        "photo": "写真",
        "alike": "最も似ている教えた写真：{label}",
        "none": "どれでもない",
        "nearest": "最も近い：{label}",
        "unlike": "確信なし：{label} の写真に似ていません（類似度 {score:.2f}、このセットの写真は {threshold:.2f} 以上）。",
        "close": "確信なし：{one} と {other} が僅差です（{first:.0%} と {second:.0%}）。違いの分かる写真を足してください。",
        "weak": "見分けにくいセットです：自分の写真を一枚ずつ除いて尋ねると、{asked} 枚中 {right} 枚が正解でした。",
        "few": "ラベルごとに二枚以上あると、セット自身で確かめられます。",
        "sure": "確信あり。",
        "conflict": "開いた後に別の人がこのセットを保存しました。開き直すか、別の名前で保存してください。",
        "bad_zip": "ここでダウンロードしたセットではありません：{why}",
        "failed": "うまくいきませんでした：{why}",
        "silent": "（返答なし）",
        "same": "{count} 枚中 {same} 枚で同じ判定です。",
    },
}

# The browser translates every text that is a key, a set's name too: a colon is in no name.
_TRANSLATED = gr.I18n(en={f"lcl:{key}": text for key, text in ENGLISH.items()}, ja={f"lcl:{key}": text for key, text in JAPANESE.items()})


def label(key: str) -> gr.i18n.I18nData:
    """In the browser's language."""
    return _TRANSLATED(f"lcl:{key}")


def translations() -> gr.I18n:
    return _TRANSLATED


def language(request: gr.Request | None) -> str:
    """Of the browser: its first, Japanese or else English."""
    asked = request.headers.get("accept-language", "") if request else ""
    return "ja" if asked.lower().startswith("ja") else "en"


def say(tongue: str, key: str, **named: object) -> str:
    return SAID[tongue][key].format(**named)
