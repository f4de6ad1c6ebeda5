"""Upstream's side, run in its own environment. It reads jobs from a file and writes their answers to another.

A job is {"do": "logits" | "pixels" | "prompts" | "train" | "ask", ...}; ``check.py`` writes them. Nothing of this
project is imported. `load_pretrained_model` hard-codes fp16. To compare in fp32, its module gets a `torch` whose
`float16` is `float32`.
"""

import importlib.util
import json
import sys
import types
from pathlib import Path

import llava.model.builder as builder
import torch
from llava.conversation import conv_templates
from llava.mm_utils import expand2square, process_images, tokenizer_image_token
from PIL import Image


class Fp32Torch(types.ModuleType):
    """torch, except that ``float16`` is ``float32``."""

    float16 = torch.float32

    def __getattr__(self, name):
        return getattr(torch, name)


def load(job):
    builder.torch = torch if job.get("half") else Fp32Torch("torch")
    tokenizer, model, processor, _ = builder.load_pretrained_model(
        job["model"], job.get("base"), Path(job["model"]).name, device_map=None, device="cpu"
    )
    return tokenizer, model.eval() if job.get("half") else model.float().eval(), processor


def images_of(job, processor, config):
    images = [Image.open(p).convert("RGB") for p in job["images"]]
    if job["pixels"] == "upstream":
        return process_images(images, processor, config)
    colour = (255, 255, 255) if job["pixels"] == "white" else tuple(int(255 * m) for m in processor.image_mean)
    pixels = [processor.preprocess(expand2square(i, colour), return_tensors="pt")["pixel_values"][0] for i in images]
    return [p[None] for p in pixels] if job["pixels"] == "base tile" else torch.stack(pixels)


@torch.no_grad()
def logits(job):
    """Logits of the first new token after each prompt."""
    tokenizer, model, processor = load(job)
    rows = []
    for prompt in job["prompts"]:
        ids = tokenizer_image_token(prompt["text"], tokenizer, return_tensors="pt")[None]
        images = images_of({**job, **prompt}, processor, model.config)
        images = [i.to(model.dtype) for i in images] if isinstance(images, list) else images.to(model.dtype)
        sizes = [Image.open(p).size for p in prompt["images"]]
        out = model(input_ids=ids, images=images, image_sizes=sizes)
        rows.append(out.logits[0, -1].float().tolist())
    return rows


def pixels(job):
    _, model, processor = load(job)
    images = images_of(job, processor, model.config)
    return [i.float().tolist() for i in images]


def prompts(job):
    """Upstream's own text for turns. ``conversation`` is the name of its conversation style."""
    texts = []
    for turns in job["turns"]:
        conversation = conv_templates[job["conversation"]].copy()
        conversation.messages = []
        for role, text in turns:
            conversation.append_message(conversation.roles[role == "assistant"], text)
        texts.append(conversation.get_prompt())
    return texts


def train(job):
    """Write a random adapter as upstream's train.py does: LoRA on modules chosen by suffix, and the projector in full."""
    from peft import LoraConfig, get_peft_model

    _, model, _ = load(job)
    names = {
        n.split(".")[-1] for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "vision_tower" not in n and "mm_projector" not in n
    }
    config = LoraConfig(r=4, lora_alpha=8, target_modules=sorted(names - {"lm_head"}), lora_dropout=0.05, bias="none", task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    torch.manual_seed(3)
    state, other = {}, {}
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            in_language_model = "vision_tower" not in name
            parameter.data.normal_(0, 0.05 if in_language_model else 0.02)
            if not in_language_model and "lora_B" in name:
                parameter.data.zero_()  # upstream does not train the tower
            state[name.replace(".default", "")] = parameter.data.clone()
        elif "mm_projector" in name:
            parameter.data += 0.05 * torch.randn_like(parameter)
            other[name] = parameter.data.clone()
        elif "image_newline" in name:
            other[name] = parameter.data.clone()
    out = Path(job["out"])
    out.mkdir(parents=True)
    model.config.save_pretrained(out)
    model.peft_config["default"].save_pretrained(out)
    torch.save(state, out / "adapter_model.bin")
    torch.save(other, out / "non_lora_trainables.bin")
    return sorted(state)[:2]


def ask(job):
    """The answers of the exported script ``ask_upstream.py``."""
    builder.torch = Fp32Torch("torch")
    spec = importlib.util.spec_from_file_location("ask_upstream", Path(job["adapter"]) / "ask_upstream.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.load_pretrained_model = builder.load_pretrained_model
    arguments = ["--base", job["base"], "--device", "cpu", "--new-tokens", str(job["new_tokens"]), job["support"], *job["queries"]]
    return script.main(arguments)


def main():
    jobs = json.loads(Path(sys.argv[1]).read_text())
    answers = []
    for job in jobs:
        answers.append(globals()[job["do"]](job))
        Path(sys.argv[2]).write_text(json.dumps(answers))


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
