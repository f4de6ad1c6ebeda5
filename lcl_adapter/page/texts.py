"""The page's texts, in English and Japanese.

The browser translates the labels of fields and buttons; the server writes the messages.
"""

from __future__ import annotations

import gradio as gr

ENGLISH = {
    "title": "# Teach by photos",
    "lead": "Show a few photos of each class, and the model classifies new photos by them. No training runs. A set of photos is stored under a name.",
    "teach": "Teach",
    "ask": "Ask",
    "compare": "Compare",
    "chat": "Chat",
    "stored": "Stored set",
    "load": "Open",
    "remove": "Remove",
    "example": "Try the example",
    "set_name": "Name of the set",
    "set_name_info": "letters, digits, dots, dashes and underscores",
    "group": "Label",
    "photos": "Photos of this label",
    "add_group": "Add a label",
    "save": "Save",
    "export": "Download as a folder",
    "exported": "The set, as a zip file",
    "import": "Upload a downloaded set",
    "copy": "A copy of the set: as a folder that `lcl-adapter ask` reads",
    "clear": "Clear all",
    "set": "Classify by",
    "model": "Model",
    "queries": "Photos to classify",
    "question": "Question (optional)",
    "question_info": "if empty, the question of the set or of the model is used",
    "ask_button": "Classify",
    "reject": "No label for photos that are unlike all photos of the set",
    "reject_info": "off: the most likely label is always shown",
    "base": "Base",
    "adapter": "Adapter",
    "compare_button": "Classify with both",
    "with_set": "Show the model this set first",
    "nothing": "no set",
    "message": "Message",
    "message_hint": "Type a question; add photos with the clip",
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
    "group": "ラベル",
    "photos": "このラベルの写真",
    "add_group": "ラベルを追加",
    "save": "保存",
    "export": "フォルダーとしてダウンロード",
    "exported": "セット（zip ファイル）",
    "import": "ダウンロードしたセットを取り込む",
    "copy": "セットの写し：`lcl-adapter ask` が読むフォルダー",
    "clear": "すべて消す",
    "set": "使うセット",
    "model": "モデル",
    "queries": "判定する写真",
    "question": "質問（任意）",
    "question_info": "空欄なら、セットまたはモデルの既定の質問",
    "ask_button": "判定",
    "reject": "教えた写真のどれにも似ていなければラベルを付けない",
    "reject_info": "オフにすると、常に最も近いラベルを返します",
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
MESSAGES = {
    "en": {
        "login": "Login",
        "username": "Username: the name of your key",
        "password": "Password: your key",
        "wrong_key": "Incorrect credentials: the server does not know this name with this key.",
        "saved": "Saved {name}, version {version}: {counts}.",
        "opened": "Opened {name}, version {version}: {counts}.",
        "removed": "Removed {name}.",
        "imported": "Uploaded: {count} photos. Give the set a name and save it.",
        "example": "These are drawings that the shipped base was not trained on. Save them, then classify the photos under Ask.",
        "example_photos": "These are photos of tools, which photo-lcl was not trained on. Save them, then classify the others under Ask.",
        "no_set": "Save or choose a set first.",
        "no_name": "Give the set a name.",
        "no_photos": "Add a photo first.",
        "no_labels": "Give at least two labels with photos.",
        "label_missing": "Group {number} has photos and no label.",
        "photos_missing": "{label} has no photos.",
        "photo": "Photo",
        "most_alike": "most similar photo of the set: {label}",
        "base_alone": "The base alone: {label}, {chance:.0%}",
        "none": "none of these",
        "nearest": "most likely: {label}",
        "unlike": "Not sure: it looks unlike the photos of {label} (similarity {score:.2f}; this set's own photos have {threshold:.2f} or more).",
        "close": "Not sure: {first_label} and {second_label} are close ({first:.0%} and {second:.0%}). More photos of the difference can help.",
        "weak": "This set is difficult: when each of its photos was left out and classified by the others, {right} of {left_out} were right.",
        "few": "With at least two photos per label, the set can be checked on its own photos.",
        "sure": "Sure.",
        "parts": "This set has more photos than the model reads at once: it was asked in {parts} parts, and their scores are averaged.",
        "conflict": "Another visitor has saved this set since you opened it. Open it again, or save under another name.",
        "bad_zip": "This is not a set that was downloaded here: {why}",
        "failed": "It did not work: {why}",
        "silent": "(no answer)",
        "same": "Both models give the same answer for {same} of {count} photos.",
    },
    "ja": {
        "login": "ログイン",
        "username": "ユーザー名（キーの名前）",
        "password": "パスワード（キー）",
        "wrong_key": "名前またはキーが正しくありません。",
        "saved": "{name} をバージョン {version} として保存しました（{counts}）。",
        "opened": "{name} のバージョン {version} を開きました（{counts}）。",
        "removed": "{name} を削除しました。",
        "imported": "写真 {count} 枚を取り込みました。名前を付けて保存してください。",
        "example": "付属ベースの学習に使っていない絵です。保存してから「判定する」で試してください。",
        "example_photos": "photo-lcl の学習に使っていない工具の写真です。保存してから「判定する」で試してください。",
        "no_set": "先にセットを保存するか選んでください。",
        "no_name": "セットに名前を付けてください。",
        "no_photos": "先に判定する写真を追加してください。",
        "no_labels": "写真のあるラベルを二つ以上用意してください。",
        "label_missing": "{number} 番目の写真にラベルがありません。",
        "photos_missing": "{label} の写真がありません。",
        "photo": "写真",
        "most_alike": "最も似ている教えた写真：{label}",
        "base_alone": "ベースのみ：{label}（{chance:.0%}）",
        "none": "どれでもない",
        "nearest": "最も近い：{label}",
        "unlike": "確信なし：{label} の写真に似ていません（類似度 {score:.2f}、このセットの写真は {threshold:.2f} 以上）。",
        "close": "確信なし：{first_label} と {second_label} が僅差です（{first:.0%} と {second:.0%}）。違いの分かる写真を足してください。",
        "weak": "見分けにくいセットです：自分の写真を一枚ずつ除いて尋ねると、{left_out} 枚中 {right} 枚が正解でした。",
        "few": "ラベルごとに二枚以上あると、セット自身で確かめられます。",
        "sure": "確信あり。",
        "parts": "一度に読める枚数を超えるセットなので、{parts} つに分けて尋ね、スコアを平均しました。",
        "conflict": "開いた後に別の人がこのセットを保存しました。開き直すか、別の名前で保存してください。",
        "bad_zip": "ここでダウンロードしたセットではありません：{why}",
        "failed": "うまくいきませんでした：{why}",
        "silent": "（返答なし）",
        "same": "{count} 枚中 {same} 枚で同じ判定です。",
    },
}

# The browser translates every text that is a key, and that could be a set's name. No name has a colon.
_TRANSLATED = gr.I18n(en={f"lcl:{key}": text for key, text in ENGLISH.items()}, ja={f"lcl:{key}": text for key, text in JAPANESE.items()})


def label(key: str) -> gr.i18n.I18nData:
    """The text of a field or button, in the browser's language."""
    return _TRANSLATED(f"lcl:{key}")


def translations() -> gr.I18n:
    return _TRANSLATED


def language_of(request: gr.Request | None) -> str:
    """The key of MESSAGES for the browser's first language: Japanese, or else English."""
    accepted = request.headers.get("accept-language", "") if request else ""
    return "ja" if accepted.lower().startswith("ja") else "en"


def message(language: str, key: str, **values: object) -> str:
    return MESSAGES[language][key].format(**values)
