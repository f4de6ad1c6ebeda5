"""Export a merged model for llama.cpp and Ollama: two GGUF files, a Modelfile, and the commands that serve them.

llama.cpp's converter does not convert a LLaVA-1.5's vision tower: for ``LlavaForConditionalGeneration`` it knows
Pixtral's only (conversion/llava.py). Its older scripts do, and are no longer maintained. So the files are written here
(``gguf_files``); of the language model, llama.cpp's own converter can write its file instead.

llama.cpp has computed CLIP towers wrongly since May 2025, and so does Ollama, which contains it (ggml-org/llama.cpp
issue 25814; the repair, pull request 25844, was open in November 2026). It puts the class token behind the patches,
where positions and choice of outputs expect it in front. ``class_token="last"`` writes positions for that order.

What llama.cpp does with a prompt: tools/mtmd/mtmd.cpp, common/chat.cpp. What Ollama does: server/prompt.go.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lcl_adapter.base.adapter import MANIFEST, checkpoint_of, read_manifest
from lcl_adapter.base.families import Family
from lcl_adapter.base.families.base import IMAGE
from lcl_adapter.base.layouts import Checkpoint, CheckpointWriter, open_checkpoint
from lcl_adapter.base.layouts.tensors import PlannedTensor, Shards
from lcl_adapter.base.layouts.writing import slow_tokenizer
from lcl_adapter.base.model import family_of
from lcl_adapter.base.ref import NOT_GIVEN, BaseRef
from lcl_adapter.checkpoints.exchange import gguf_files
from lcl_adapter.checkpoints.exchange.gguf_files import ClassToken
from lcl_adapter.checkpoints.merge import merge
from lcl_adapter.errors import ModelError, RunError
from lcl_adapter.files import whole_folder, write_json, write_text
from lcl_adapter.recipe import load

MERGED = "llava-merged"  # a folder that is removed again; a base in the original layout needs such a name
MODEL, MMPROJ, MODELFILE = "model.gguf", "mmproj.gguf", "Modelfile"
TOWER, LANGUAGE = "clip_vision_model", "llama"  # the model types that the files are written for
ACTIVATIONS = ("quick_gelu", "gelu")  # of a tower, in clip.cpp
OLLAMA_IMAGE = 768  # tokens that Ollama counts for a picture, whatever the model (server/prompt.go)
TURN = 16  # tokens of a question and its answer, about
SHARD = 5 * 10**9  # bytes


@dataclass(frozen=True)
class Model:
    """What is exported: a checkpoint, its family, and the merge's report, None for one that was merged before.

    title: for people. wording: of the run's episodes. name: for a server. class_token: see above.
    """

    checkpoint: Checkpoint
    family: Family
    title: str
    wording: str
    name: str
    class_token: ClassToken
    merged: dict[str, Any] | None

    @property
    def context(self) -> int:
        """In tokens."""
        return int(self.checkpoint.config.text_config.max_position_embeddings)

    @property
    def image_tokens(self) -> int:
        """Tokens that a picture takes."""
        tower = self.checkpoint.config.vision_config
        return int((tower.image_size // tower.patch_size) ** 2)


def export_for_llama_cpp(
    source: Path,
    out: Path,
    base: BaseRef = NOT_GIVEN,
    name: str = "lcl",
    llama_cpp: Path | None = None,
    class_token: ClassToken = "last",
) -> dict[str, Any]:
    """Write ``out`` for llama.cpp and Ollama. Every tensor is read again and compared, and none is rounded.

    source: a run, which is merged first with all checks of a merge; or a merged checkpoint in either layout.
    base: where the run's base is now, or the vision tower of a checkpoint. name: of the model, for Ollama.
    llama_cpp: a checkout of llama.cpp, whose converter then writes the language model.
    class_token: "last" for a llama.cpp with the defect, see above.

    Raises ModelError, with what to do instead, for a base that llama.cpp computes otherwise. Raises RunError if ``out``
    exists, or if the converter is missing or fails. Raises MergeError if a written tensor differs.
    """
    gguf_files.require_gguf()
    if out.exists():
        raise RunError(f"{out}: exists already; nothing is overwritten. Give another -o.")
    converter = None if llama_cpp is None else gguf_files.find_converter(llama_cpp)
    is_run = not (source / "config.json").exists() or (source / MANIFEST).exists()
    if is_run:
        checkpoint = checkpoint_of(source, read_manifest(source), base)
    else:
        if base.name is not None:
            raise RunError(f"{source}: a checkpoint and not a run, so --base has no meaning; leave it out.")
        checkpoint = open_checkpoint(replace(base, name=str(source)))
    family = family_of(checkpoint)
    _check_supported(checkpoint, family)
    with whole_folder(out) as partial:
        merged = None
        if is_run:
            merged = merge(source, partial / MERGED, base)
            checkpoint = open_checkpoint(BaseRef(str(partial / MERGED), tower=checkpoint.ref.tower))
        wording = load(source / "recipe.yaml").wording if is_run and (source / "recipe.yaml").exists() else "lcl"
        model = Model(checkpoint, family, source.resolve().name, wording, name, class_token, merged)
        counts = _write_files(model, partial, converter)
        shutil.rmtree(partial / MERGED, ignore_errors=True)
        write_text(partial / MODELFILE, modelfile(model))
        write_text(partial / "README.md", _readme(model))
        size = sum((partial / file).stat().st_size for file in (MODEL, MMPROJ))
    return {
        "out": str(out),
        "bytes": size,
        "tensors_equal": counts,
        "written_by": "llama.cpp" if converter else "gguf",
        "class_token": class_token,
        "image_tokens": model.image_tokens,
        "context": model.context,
        "merge": None if merged is None else {**merged, "out": None},
    }


def _check_supported(checkpoint: Checkpoint, family: Family) -> None:
    """Raises ModelError where llama.cpp has no such tower, or computes the projector or the prompt otherwise."""
    for reason in _reasons_against(checkpoint.config, family):
        raise ModelError(f"{checkpoint.folder}: GGUF files are written for LLaVA-1.5 on Llama with a CLIP tower; {reason}. Use `lcl-adapter serve`.")
    if not (checkpoint.folder / "tokenizer.model").exists():
        raise ModelError(
            f"{checkpoint.folder}: has no tokenizer.model, of which llama.cpp's tokenizer is made. Copy it beside the checkpoint "
            "(llava-hf's bases have it; Vicuna's own works too) and run the command again."
        )


def _reasons_against(config: Any, family: Family) -> Iterator[str]:
    """What llama.cpp does not have or computes otherwise. A later check reads fields that exist where the earlier ones pass."""
    tower, text = config.vision_config, config.text_config
    if tower.model_type != TOWER:
        yield f"its vision tower is {tower.model_type}, which is not computed in llama.cpp's LLaVA"
    if config.model_type != "llava":
        yield f"it is a {config.model_type}, whose tiles and line-break vectors llama.cpp computes otherwise"
    if text.model_type != LANGUAGE:
        yield f"its language model is {text.model_type}"
    if config.projector_hidden_act == "linear":
        yield "its projector has one layer, and llama.cpp computes GELU behind the first"
    if config.projector_hidden_act != "gelu":
        yield f"its projector's activation is {config.projector_hidden_act}"
    if not isinstance(config.vision_feature_layer, int):
        yield "its projector reads several layers of the tower"
    if config.vision_feature_select_strategy != "default":
        yield "its projector reads the class token too"
    if tower.hidden_act not in ACTIVATIONS:
        yield f"its tower's activation is {tower.hidden_act}"
    if tower.intermediate_size == tower.hidden_size:
        yield "its tower's layers are as wide inside as outside, and llama.cpp then swaps their two halves"
    if (rope := (getattr(text, "rope_parameters", None) or {}).get("rope_type", "default")) != "default":
        yield f"its positions are scaled ({rope})"
    if text.hidden_act != "silu" or text.attention_bias or text.mlp_bias:
        yield "its language model's layers have an activation or biases that a Llama does not have"
    if not family.both_layouts:
        yield f"its prompt is that of {family.name}"


def _write_files(model: Model, folder: Path, converter: Path | None) -> int:
    """Write both GGUF files and compare them; returns the number of tensors. Raises MergeError, RunError."""
    checkpoint, text = model.checkpoint, model.checkpoint.config.text_config
    vision = gguf_files.vision_tensors(checkpoint, model.class_token)
    gguf_files.write_vision(folder / MMPROJ, model.title, checkpoint, vision)
    planned = _plain_llama(checkpoint)
    language = gguf_files.language_tensors(planned, text)
    plain = folder / "plain"  # what both converters read
    _write_small_files(model, plain, planned)
    if converter is None:
        gguf_files.write_language(folder / MODEL, model.title, text, language, plain)
    else:
        for _ in Shards(planned, SHARD).write(plain):
            pass
        gguf_files.run_converter(converter, plain, folder / MODEL, planned[0].dtype)
    shutil.rmtree(plain)
    return gguf_files.check_written(folder / MMPROJ, vision) + gguf_files.check_written(folder / MODEL, language)


def _plain_llama(checkpoint: Checkpoint) -> list[PlannedTensor]:
    """The language model's tensors as a Llama's own checkpoint has them, without rows of added tokens."""
    planned = CheckpointWriter(checkpoint, "original", {}).shards.planned
    return [tensor for tensor in planned if not tensor.key.startswith(("model.mm_projector.", "model.vision_tower."))]


def _write_small_files(model: Model, folder: Path, planned: Sequence[PlannedTensor]) -> None:
    """Config, tokenizer and chat template of the language model alone."""
    checkpoint, text = model.checkpoint, model.checkpoint.config.text_config
    rows = next(tensor.shape[0] for tensor in planned if tensor.key == "model.embed_tokens.weight")
    folder.mkdir()
    config = {
        **text.to_dict(),
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": rows,
        "rope_theta": gguf_files.rope_theta(text),
        "tie_word_embeddings": False,
        "pad_token_id": checkpoint.tokenizer.unk_token_id,
        "bos_token_id": checkpoint.tokenizer.bos_token_id,
        "eos_token_id": checkpoint.tokenizer.eos_token_id,
        "torch_dtype": str(planned[0].dtype).removeprefix("torch."),
    }
    write_json(folder / "config.json", {key: value for key, value in config.items() if key not in {"dtype", "_name_or_path"}})
    shutil.copyfile(checkpoint.folder / "tokenizer.model", folder / "tokenizer.model")
    write_json(folder / "tokenizer_config.json", {**slow_tokenizer(checkpoint.tokenizer), "chat_template": chat_template(model.family)})


def chat_template(family: Family) -> str:
    """The family's prompt as a Jinja template for llama.cpp, which puts a marker for each picture into the text.

    A marker ends with ``__>``. The line break that follows a picture is added where the text does not begin with it.
    """

    def quoted(text: str) -> str:
        return repr(text)

    before, after = family.user.replace("{image}", "").split("{text}")
    opening, closing = family.answer.split("{text}")
    behind = family.image.split(IMAGE)[1]
    content = "m['content']"
    marked = f"{content} | replace({quoted('__>' + behind)}, '__>') | replace('__>', {quoted('__>' + behind)})"
    return (
        "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] + ' ' }}{% else %}{{ " + quoted(family.system) + " }}{% endif %}"
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ " + quoted(before) + " }}"
        "{% if '<__media' in " + content + " %}{{ " + marked + " }}{% else %}{{ " + content + " }}{% endif %}{{ " + quoted(after) + " }}"
        "{% elif m['role'] == 'assistant' %}{{ " + quoted(family.assistant + opening) + " + " + content + " + " + quoted(closing + family.end) + " }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ " + quoted(family.assistant) + " }}{% endif %}"
    )


def modelfile(model: Model) -> str:
    """Ollama's description of the model: the files, the prompt as a Go template, and greedy answers."""
    family = model.family
    before, after = family.user.replace("{image}", "").split("{text}")
    opening, closing = family.answer.split("{text}")
    template = (
        "{{ if .System }}{{ .System }} {{ else }}" + family.system + "{{ end }}"
        '{{ range .Messages }}{{ if eq .Role "user" }}' + before + "{{ .Content }}" + after + "{{ else if eq .Role \"assistant\" }}"
        + family.assistant + opening + "{{ .Content }}" + closing + family.end + "{{ end }}{{ end }}" + family.assistant
    )  # fmt: skip
    return (
        f"# ollama create {model.name} -f {MODELFILE}\nFROM ./{MODEL}\nFROM ./{MMPROJ}\n"
        f'TEMPLATE """{template}"""\n'
        f'PARAMETER temperature 0\nPARAMETER num_ctx {model.context}\nPARAMETER stop "{family.end}"\n'
    )


def _readme(model: Model) -> str:
    pictures = max(1, model.context // (model.image_tokens + TURN))
    in_ollama = max(1, (model.context - 1) // OLLAMA_IMAGE)
    notes = "".join(f"- The adapter was {note}.\n" for note in (model.merged or {}).get("notes", []))
    origin = f"the run `{model.title}`, merged into its base" if model.merged is not None else f"the checkpoint `{model.title}`"
    return f"""# {model.title}, for llama.cpp and Ollama

Exported by lcl-adapter from {origin}.

| file | what it is |
|---|---|
| `{MODEL}` | the language model, in the type that it was stored in |
| `{MMPROJ}` | the vision tower and the projector |
| `{MODELFILE}` | Ollama's description of both, with the prompt |

## First: the class token

{_class_token_text(model.class_token)}

## llama.cpp

```
llama-server -m {MODEL} --mmproj {MMPROJ} --alias {model.name} -c {model.context} --temp 0 --port 8080
lcl-adapter ask photos/ query.png --endpoint http://127.0.0.1:8080 --model {model.name} --wording {model.wording} --pad
llama-mtmd-cli -m {MODEL} --mmproj {MMPROJ} -c {model.context} --temp 0 --image query.png -p "What is this?"
```

The prompt is stored in `{MODEL}`, so leave `--chat-template` out. A smaller file, with some loss:
`llama-quantize {MODEL} model-q8_0.gguf Q8_0`. Leave `{MMPROJ}` as it is.

## Ollama

```
ollama create {model.name} -f {MODELFILE}
ollama run {model.name} "What is this? ./query.png"
```

In training, a line break stands between a picture and its question. Ollama adds none: begin the text of a message that
has a picture with one. Ollama itself was not run by this project.

## What carries over

- The merged weights, none of them rounded again: every tensor was read back and compared. The prompt. Answers as text.
- A picture takes {model.image_tokens} of the {model.context} tokens, so about {pictures} fit, the query included.
- Ollama counts {OLLAMA_IMAGE} tokens a picture, and drops the oldest messages that do not fit without a word. Show it {in_ollama} pictures
  at most, the query included.

## What does not

- Stored support sets: the labelled photos go with each request. llama-server reads an unchanged beginning once.
- Calibrated probabilities, "none of these", and judgements by the vision tower.
- Pictures are padded to squares with CLIP's mean colour, but after they were resized. `--pad` pads them before, as in training.
{notes}"""


def _class_token_text(class_token: ClassToken) -> str:
    """What the reader must know of llama.cpp's defect: which of the two programs the file is for."""
    defect = f"""llama.cpp computes CLIP towers wrongly since May 2025: it puts the class token behind the patches instead of in front
(https://github.com/ggml-org/llama.cpp/issues/25814). Ollama contains the same code. `{MMPROJ}` here is for a llama.cpp """
    if class_token == "first":
        return f"""{defect}**without**
this defect. To repair it, swap the patches and the class embedding where `tools/mtmd/models/llava.cpp` joins them, and
build llama.cpp. Then the answers are those of training. Where that cannot be done, export with `--class-token last`, the default."""
    return f"""{defect}**with**
this defect: positions are in its order, so every patch is computed as in training. What remains is that the first patch
of a picture is missing and the class token stands behind the last. In a llama.cpp without the defect this file is
wrong: export again with `--class-token first`."""
